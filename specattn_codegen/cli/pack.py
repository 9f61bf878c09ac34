"""specattn-pack: what packs there are, what is in them, why a call gets its plan, and how packs are kept and shared."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

import click

from specattn_codegen import cpu_info, gpu_detect, gpus, ladder, pack, pack_file, pack_merge, paths
from specattn_codegen.arch import Arch
from specattn_codegen.buckets import FARTHEST
from specattn_codegen.cli import console
from specattn_codegen.cli import pack_tables as tables
from specattn_codegen.cli.progress import console as output
from specattn_codegen.cli.progress import microseconds
from specattn_codegen.cli.tune_request import DEFAULT_PAGE_SIZE, find_heads
from specattn_codegen.errors import PackError, SpecError
from specattn_codegen.explain import neighbours
from specattn_codegen.ladder import Found, Ladder
from specattn_codegen.pack import Pack
from specattn_codegen.silicon import arch_of
from specattn_codegen.spec import DTYPES, FLOAT8, OPS, Dtype, KernelSpec, KvDtype, Op, ScoreHeads, ScoreSpec, Workload
from specattn_codegen.staleness import MEANING, Grade, grade
from specattn_codegen.workloads import BUDGET, DRAFT_LEN

FEW = 8  # packs of one processor that a list spells out

Row = dict[str, object]

DIFFERENT = 1  # exit code of a diff that finds something, as of diff(1)

EXAMPLES = """
\b
Examples:
  specattn-pack list                                    every pack that lookups see, by layer
  specattn-pack show h100/q32-kv8-d128                  what one holds, and whether it still holds today
  specattn-pack explain --model llama3-8b --gpu h100 --kv-len 65536
  specattn-pack verify path/to/packs                    damage, tampering and plans that no longer work
  specattn-pack diff old.json new.json
  specattn-pack merge mine.json yours.json --out best.json
  specattn-pack install best.json                       into your own layer
  specattn-pack promote h100/q32-kv8-d128 --to site     from your layer to everybody's

\b
A lookup takes the first layer that has an entry for the call's own size bucket:
  explicit     load_kernels(packs=...), --packs
  environment  SPECATTN_CONFIG_DIR
  user         what specattn-tune and specattn-pack install write
  site         for all users of the machine
  shipped      what came with the project
"""

packs_option = click.option(
    "--packs",
    multiple=True,
    type=click.Path(path_type=Path, exists=True),
    help="A folder of packs, or one, looked up before all others; may be repeated.",
)


@click.group(epilog=EXAMPLES, context_settings={"help_option_names": ["-h", "--help"]}, invoke_without_command=True)
@click.pass_context
def command(context: click.Context) -> None:
    """Look at, check, compare, merge and share packs of tuned kernels.

    A pack is one JSON file: the winning plans of one HeadConfig on one processor, as <processor>/<heads>.json.
    WHAT, below, is the path of a file or such a name without .json.
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """A pack's file and the layer it is in."""

    layer: str
    path: Path


def files_of(folder: Path) -> list[Path]:
    """The packs of a layer; the layer itself where it is one."""
    return sorted(folder.glob("*/*.json")) if folder.is_dir() else [folder] if folder.exists() else []


def named_files(given: Iterable[Path]) -> list[Path]:
    """Files as they are named, and every one in the folders that are."""
    return [path for one in given for path in (sorted(one.rglob("*.json")) if one.is_dir() else [one])]


def places(packs: Iterable[Path]) -> list[Place]:
    return [Place(layer=layer, path=path) for layer, folder in paths.named_layers(*packs) for path in files_of(folder)]


def find(what: str, packs: Iterable[Path] = ()) -> Place:
    """The file of that path, or the first layer's pack of that name. Raises SpecError where there is none."""
    if Path(what).exists():
        return Place(layer="file", path=Path(what))
    wanted = what.removesuffix(".json")
    known = places(packs)
    for place in known:
        if f"{place.path.parent.name}/{place.path.stem}" == wanted:
            return place
    raise SpecError(f"{what}: no such file and no pack of that name; `specattn-pack list` shows all {len(known)}")


def grades(found: Pack) -> list[Grade]:
    arch = arch_of(found.arch)
    return [grade(entry, arch) for entry in found.entries]


def graded(found: Pack) -> dict[str, int]:
    """How many entries have each grade."""
    return {str(name): count for name, count in Counter(grades(found)).items()}


def say(line: str) -> None:
    output().print(pack_file.printable(line), markup=False, soft_wrap=True)


@command.command("list")
@click.argument("processor", required=False)
@packs_option
@click.option("--json", "as_json", is_flag=True, help="One JSON value, with every pack, instead of a table.")
@click.option("--today", is_flag=True, help="Also how much of each still holds, for which every kernel is rendered.")
def list_packs(processor: str | None, packs: tuple[Path, ...], as_json: bool, today: bool) -> None:
    """Every pack that lookups see, or those of one PROCESSOR, the first layer first.

    Where a layer has many packs of one processor they are one line; name the processor to see them all.
    """
    listed = [place for place in places(packs) if processor in (None, place.path.parent.name)]
    rows = [_row(place, today=today) for place in listed]
    if as_json:
        click.echo(json.dumps([_worded(row) for row in rows], indent=2, sort_keys=True))
        return
    columns = ("layer", "pack", "entries", "kernels", "label", *(("today",) if today else ()), "file")
    shown = tables.table(*columns, folds=("label", "today", "file"))
    for row in map(_worded, rows if processor else _folded(rows)):
        shown.add_row(*(str(row[name]) for name in columns))
    output().print(shown)
    have = {row["layer"] for row in rows}
    for layer, folder in paths.named_layers(*packs):
        if layer not in have:
            say(f"{layer}: none in {folder}")
    say("next: specattn-pack list PROCESSOR, specattn-pack show PACK, or specattn-tune --help to make one")


def _row(place: Place, *, today: bool) -> Row:
    """label and today are counts, or a text where nothing can be counted."""
    row: Row = {
        "layer": place.layer,
        "pack": pack_file.printable(f"{place.path.parent.name}/{place.path.stem}"),
        "file": pack_file.printable(place.path),
    }
    try:
        found = pack.load(place.path)
    except (PackError, OSError) as error:
        return row | {"entries": 0, "kernels": 0, "today": "", "label": f"unreadable: {pack_file.one_line(error)}"}
    return row | {
        "today": graded(found) if today else "",
        "entries": len(found.entries),
        "kernels": len(found.coverage),
        "label": found.provenance["chosen_by"],
    }


def _worded(row: Row) -> Row:
    return {name: tables.counted(value) if isinstance(value, dict) else value for name, value in row.items()}


def _folded(rows: Iterable[Row]) -> Iterable[Row]:
    """Readable packs of one layer and processor as one row where there are many."""
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        alone = row["file"] if isinstance(row["label"], str) else ""
        groups.setdefault((row["layer"], Path(str(row["file"])).parent, alone), []).append(row)
    for (layer, folder, _), group in groups.items():
        if len(group) <= FEW:
            yield from group
        else:
            summed = {name: _sum(row[name] for row in group) for name in ("entries", "kernels", "label", "today")}
            yield {
                "layer": layer,
                "pack": f"{Path(str(folder)).name}: {len(group)} packs",
                "file": str(folder),
                **summed,
            }


def _sum(values: Iterable[object]) -> object:
    """Of numbers, or of counts."""
    counts, number = Counter[str](), 0
    for value in values:
        if isinstance(value, dict):
            counts.update(value)
        elif isinstance(value, int):
            number += value
    return dict(counts) or number or ""


@command.command()
@click.argument("what")
@packs_option
def show(what: str, packs: tuple[Path, ...]) -> None:
    """What a pack holds: manifest, entries, and what of them still holds today."""
    place = find(what, packs)
    found = pack.load(place.path)
    say(f"{place.path} ({place.layer})")
    for line in tables.manifest_lines(found, pack.stored_digest(place.path)):
        say(line)
    today = grades(found)
    output().print(tables.entry_table(zip(found.entries, today, strict=True)))
    for each in dict.fromkeys(today):
        say(f"{each}: {MEANING[each]}")


@command.command()
@click.option("--model", metavar="NAME|PATH", help="A registered model, a Hugging Face config.json, or its folder.")
@click.option("--heads", metavar="HQ,HKV,D", help="Query heads, KV heads and head dim instead of a model.")
@click.option("--tp", type=int, default=1, show_default=True, help="Tensor-parallel ranks the heads are split over.")
@click.option("--gpu", default="local", show_default=True, metavar="NAME|local|cpu", help="The processor.")
@click.option("--op", type=click.Choice(OPS), default="verify_attention", show_default=True)
@click.option("--score", metavar="ROWS,HEADS[,...]", help="Scores of a verification, as all,kv_head or ends,layer.")
@click.option("--selection", type=click.Choice(get_args(ScoreHeads)), help="Of a selection or a sparse read. [kv_head]")
@click.option("--dtype", type=click.Choice(DTYPES), help="Of q and the KV cache. [bfloat16; float32 on the CPU]")
@click.option("--kv-dtype", type=click.Choice(FLOAT8), help="Of an 8-bit KV cache.")
@click.option("--page-size", type=int, default=DEFAULT_PAGE_SIZE, show_default=True, help="Keys per page of the cache.")
@click.option("--batch", type=int, default=1, show_default=True, help="Requests.")
@click.option("--q-len", type=int, help=f"Query rows a request. [{DRAFT_LEN + 1}; 1 for a sparse read]")
@click.option("--kv-len", type=int, default=4096, show_default=True, help="Keys a request.")
@click.option("--budget", type=int, help="Selected keys. [7 % of the keys]")
@packs_option
def explain(
    model: str | None,
    heads: str | None,
    tp: int,
    gpu: str,
    op: Op,
    score: str | None,
    selection: ScoreHeads | None,
    dtype: Dtype | None,
    kv_dtype: KvDtype | None,
    page_size: int,
    batch: int,
    q_len: int | None,
    kv_len: int,
    budget: int | None,
    packs: tuple[Path, ...],
) -> None:
    """Which plan a call would get, on which rung, and how the nearest entries differ."""
    arch = find_arch(gpu)
    rows = q_len or (1 if op == "sparse_attention" else DRAFT_LEN + 1)
    selects = op != "verify_attention"
    kinds = find_heads(model, heads, tp)
    workload = Workload(
        batch=batch, q_len=rows, kv_len=kv_len, budget=0 if not selects else budget or BUDGET.budget(kv_len - rows)
    )
    for kind in kinds:
        spec = KernelSpec(
            op=op,
            heads=kind,
            dtype="float32" if op == "select_kv" else dtype or ("bfloat16" if arch.is_gpu else "float32"),
            kv_dtype=kv_dtype,
            page_size=page_size if arch.is_gpu and op != "select_kv" else 0,
            score=parse_score(score) if score else None,
            selection=(selection or "kv_head") if selects else None,
        )
        known = ladder.read(arch, kind, paths.pack_layers(*packs))
        say(f"{spec.name} at {workload.name}, {kind.name} on {arch.name}")
        if _explain(known, spec, workload).rung != "exact":
            source = f"--model {model}" if model else f"--heads {heads}"
            say(f"to tune it: specattn-tune {source}{f' --tp {tp}' if tp > 1 else ''} --gpu {gpu} --op {op}")


def find_arch(gpu: str) -> Arch:
    if gpu == "cpu":
        return cpu_info.detect(measure=False)
    return gpu_detect.local() if gpu == "local" else gpus.find(gpu)


def parse_score(text: str) -> ScoreSpec:
    """`ends,layer` or `all,kv_head,reference`; the words may come in any order. Raises SpecError."""
    choices = {
        "rows": ("all", "ends", "last"),
        "heads": ("kv_head", "layer"),
        "value": ("weight", "logit"),
        "normaliser": ("exact", "reference"),
        "granularity": ("token", "page_mean", "page_max"),
    }
    fields: dict[str, str] = {}
    for word in text.split(","):
        name = next((name for name, words in choices.items() if word in words), None)
        if name is None:
            raise SpecError(f"--score {word!r}: must be of {', '.join(w for words in choices.values() for w in words)}")
        fields[name] = word
    return ScoreSpec(**fields)  # pyright: ignore[reportArgumentType]


def _explain(known: Ladder, spec: KernelSpec, workload: Workload) -> Found:
    found = known.find(spec, workload)
    for line in _found_lines(found, known.arch):
        say(f"  {line}")
    say(f"  digest   {known.digest}, equal on ranks that give every call the same plan")
    near = neighbours(known, spec, workload)
    if near:
        say(f"nearest entries; one serves within {FARTHEST:g} octaves if only its sizes or a sibling's size differ")
        today: list[Grade] = [grade(one.candidate.entry, known.arch) for one in near]
        output().print(tables.neighbour_table(zip(near, today, strict=True)))
        for each in dict.fromkeys(today):
            if each != "exact":
                say(f"{each}: {MEANING[each]}")
    else:
        say("no pack of these heads has this operation for this processor or a sibling")
    return found


def _found_lines(found: Found, arch: Arch) -> Iterable[str]:
    meaning = {
        "exact": "an entry for this size",
        "nearest": "an entry for another size",
        "sibling": "an entry of another processor of the same instruction set",
        "model": "no entry within reach: the cost model's choice among the plans that packs prove for this kernel",
        "default": "no entry within reach: the safe default plan",
    }
    yield f"rung     {found.rung}: {meaning[found.rung]}"
    yield f"plan     {found.plan}"
    if found.candidate is not None:
        entry = found.candidate.entry
        today = grade(entry, arch)
        yield f"from     {entry.workload.name} in {found.candidate.path}"
        yield f"label    {entry.chosen_by}, proved by {entry.proved_by}, {microseconds(entry.latency_us)}"
        yield f"today    {today}: {MEANING[today]}"


@command.command()
@click.argument("files", nargs=-1, type=click.Path(path_type=Path))
@click.option("--fresh", is_flag=True, help="Also refuse packs with stale entries.")
def verify(files: tuple[Path, ...], fresh: bool) -> None:
    """Check files or folders of packs; all layers where none is named.

    Exit code 2, with a line for each file that is damaged, edited by hand, of a later version, or holds plans that
    today's space refuses.
    """
    checked = named_files(files) if files else [place.path for place in places(())]
    bad = 0
    for path in checked:
        problem, summary = _examine(path, fresh)
        summary = pack_file.printable(summary)
        bad += problem
        click.echo(f"{'error: ' if problem else 'ok: '}{summary}", err=problem)
    if not checked:
        raise SpecError("nothing to verify; name a file or a folder, or make a pack with specattn-tune")
    if bad:
        sys.exit(2)


def _examine(path: Path, fresh: bool) -> tuple[bool, str]:
    """Whether a file is to be refused, and one line about it."""
    try:
        found = pack.load(path)
        counts = graded(found)
    except (PackError, SpecError) as error:
        return True, str(error) if str(path) in str(error) else f"{path}: {error}"
    except OSError as error:
        return True, f"{path}: {error.strerror}"
    summary = f"{path}: {len(found.entries)} entries, {tables.counted(counts)}"
    if counts.get("invalid"):
        return True, f"{summary}; invalid entries are never used; `specattn-pack show {path}` lists them, tune again"
    if fresh and counts.get("stale"):
        return True, f"{summary}; stale entries may be slow: tune again"
    return False, summary


@command.command()
@click.argument("before")
@click.argument("after")
def diff(before: str, after: str) -> None:
    """What changes from one pack to another. Exit code 1 where something does, as of diff."""
    old, new = (pack.load(find(what).path) for what in (before, after))
    if old.arch != new.arch or old.heads != new.heads:
        say(f"not of one thing: {old.arch.name}/{old.heads.name} and {new.arch.name}/{new.heads.name}")
    found = pack_merge.changes(old, new)
    if not found:
        say(f"equal: {len(new.entries)} entries")
        return
    output().print(tables.change_table(found))
    say(f"{len(found)} of {max(len(old.entries), len(new.entries))} entries differ")
    sys.exit(DIFFERENT)


@command.command()
@click.argument("what", nargs=-1, required=True)
@click.option("--out", type=click.Path(path_type=Path), required=True, metavar="FILE", help="The pack to write.")
def merge(what: tuple[str, ...], out: Path) -> None:
    """The best of several packs of one processor and HeadConfig.

    Measured entries go before modelled ones. Of two that were timed alike the faster by more than noise, else the one
    named first; of two that were not, or modelled, the one named last.
    """
    merged = pack_merge.merge_packs([pack.load(find(one).path) for one in what])
    with pack.locked(out):
        pack.write(out, merged)
    say(f"{out}: {len(merged.entries)} entries, {tables.counted(merged.provenance['chosen_by'])}")
    say(f"next: specattn-pack install {out}")


@command.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--to", type=click.Path(path_type=Path), metavar="DIR", help="Folder of packs. [the user's own]")
def install(files: tuple[Path, ...], to: Path | None) -> None:
    """Put packs from elsewhere into your own layer, after the checks of verify. Better entries there stay."""
    for path in named_files(files):
        refuse, line = _examine(path, fresh=False)
        if refuse:
            raise PackError(line)
        _add(to or paths.user_packs_dir(), pack.load(path))


def _add(root: Path, added: Pack) -> None:
    path, changed = pack_merge.add_to(root, added)
    say(f"{path}: {changed} of {len(added.entries)} entries are new or better")


@command.command()
@click.argument("what")
@click.option("--to", required=True, metavar="site|DIR", help="The machine's layer, or a folder of packs.")
@click.option("--measured", is_flag=True, help="Only entries that were measured.")
def promote(what: str, to: str, measured: bool) -> None:
    """Merge what still holds of a pack into a wider layer: the machine's, or a folder that ships.

    Only entries graded exact or compatible go; what is stale is tuned again first.
    """
    found = pack.load(find(what).path)
    kept = tuple(
        entry
        for entry, today in zip(found.entries, grades(found), strict=True)
        if today in ("exact", "compatible") and (not measured or entry.chosen_by == "measured")
    )
    if not kept:
        raise PackError(f"{what}: none of its {len(found.entries)} entries may go; see `specattn-pack show {what}`")
    _add(paths.site_packs_dir() if to == "site" else Path(to), replace(found, entries=kept))
    if len(kept) < len(found.entries):
        say(f"left behind: {len(found.entries) - len(kept)} entries")


def main() -> None:
    console.run(command)
