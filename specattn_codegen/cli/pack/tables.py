"""What specattn-pack prints: tables of packs, entries, changes and neighbours."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from rich import box
from rich.table import Table

from specattn_codegen.cli.progress import microseconds, short_plan
from specattn_codegen.packs.explain import Neighbour
from specattn_codegen.packs.pack import Entry, Pack
from specattn_codegen.packs.pack_merge import Change
from specattn_codegen.packs.staleness import Grade


def table(*titles: str, folds: Sequence[str] = ()) -> Table:
    made = Table(box=box.SIMPLE)
    for title in titles:
        made.add_column(title, no_wrap=title not in folds)
    return made


def counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items())


def manifest_lines(pack: Pack, digest: str) -> list[str]:
    """What a pack is, as people ask about it."""
    silicon = pack.arch
    lines = {
        "processor": f"{silicon.name} ({silicon.target}, {silicon.num_sms} multiprocessors or cores"
        + (f" of {silicon.cpu_model}" if silicon.cpu_model else "")
        + f", {silicon.l2_bytes / 2**20:g} MiB of last-level cache"
        + (f", {silicon.bandwidth_gbs:g} GB/s)" if silicon.bandwidth_gbs else ")"),
        "heads": pack.heads.name,
        "licence": pack.licence,
        "digest": digest or "none (a file of schema 1)",
        **{name.replace("_", " "): counted(values) for name, values in pack.provenance.items()},
        "coverage": f"{len(pack.entries)} entries of {len(pack.coverage)} kernels",
    }
    width = max(map(len, lines))
    return [f"{name:<{width}}  {text}" for name, text in lines.items()]


def entry_table(entries: Iterable[tuple[Entry, Grade]]) -> Table:
    made = table("kernel", "workload", "plan", "time", "of ceiling", "label", "today", folds=("plan",))
    for entry, grade in entries:
        made.add_row(
            entry.spec.name,
            entry.workload.name,
            short_plan(entry),
            microseconds(entry.latency_us),
            f"{entry.share_of_ceiling:.0%}",
            entry.chosen_by,
            grade,
        )
    return made


def change_table(changes: Iterable[Change]) -> Table:
    made = table("", "kernel", "workload", "before", "after", folds=("before", "after"))
    for change in changes:
        sign = "+" if change.before is None else "-" if change.after is None else "~"
        made.add_row(
            sign, change.entry.spec.name, change.entry.workload.name, _side(change.before), _side(change.after)
        )
    return made


def _side(entry: Entry | None) -> str:
    return "" if entry is None else f"{microseconds(entry.latency_us)} {entry.chosen_by}, {short_plan(entry)}"


def neighbour_table(neighbours: Iterable[tuple[Neighbour, Grade]]) -> Table:
    made = table("octaves", "kernel", "workload", "processor", "today", "differs in", folds=("differs in",))
    for near, grade in neighbours:
        entry = near.candidate.entry
        made.add_row(
            f"{near.octaves:.1f}",
            entry.spec.name,
            entry.workload.name,
            near.candidate.silicon.name,
            grade,
            "\n".join(near.differences) or "nothing",
        )
    return made
