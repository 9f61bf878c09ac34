"""specattn-pack explain: which plan a call would get, on which rung, and what the nearest entries differ in."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import get_args

import click

from specattn_codegen import paths
from specattn_codegen.buckets import FARTHEST
from specattn_codegen.cli.options import HEADS, KV_DTYPE, MODEL, PACKS, PAGE_SIZE, TP
from specattn_codegen.cli.pack import tables
from specattn_codegen.cli.progress import console, microseconds, say
from specattn_codegen.cli.tune_request import find_heads
from specattn_codegen.errors import SpecError
from specattn_codegen.packs import ladder
from specattn_codegen.packs.explain import neighbours
from specattn_codegen.packs.ladder import Found, Ladder
from specattn_codegen.packs.staleness import MEANING, Grade, grade
from specattn_codegen.processors import cpu_info, gpu_detect, gpus
from specattn_codegen.processors.arch import Arch
from specattn_codegen.spec import DTYPES, OPS, Dtype, KernelSpec, KvDtype, Op, ScoreHeads, ScoreSpec, Workload
from specattn_codegen.workloads import BUDGET, DRAFT_LEN


@click.command()
@MODEL
@HEADS
@TP
@click.option("--gpu", default="local", show_default=True, metavar="NAME|local|cpu", help="The processor.")
@click.option("--op", type=click.Choice(OPS), default="verify_attention", show_default=True)
@click.option("--score", metavar="ROWS,HEADS[,...]", help="Scores of a verification, as all,kv_head or ends,layer.")
@click.option("--selection", type=click.Choice(get_args(ScoreHeads)), help="Of a selection or a sparse read. [kv_head]")
@click.option("--dtype", type=click.Choice(DTYPES), help="Of q and the KV cache. [bfloat16; float32 on the CPU]")
@KV_DTYPE
@PAGE_SIZE
@click.option("--batch", type=int, default=1, show_default=True, help="Requests.")
@click.option("--q-len", type=int, help=f"Query rows a request. [{DRAFT_LEN + 1}; 1 for a sparse read]")
@click.option("--kv-len", type=int, default=4096, show_default=True, help="Keys a request.")
@click.option("--budget", type=int, help="Selected keys. [7 % of the keys]")
@PACKS
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
    if q_len is None:
        q_len = 1 if op == "sparse_attention" else DRAFT_LEN + 1
    selects = op != "verify_attention"
    kinds = find_heads(model, heads, tp)
    if not selects:
        budget = 0
    elif budget is None:
        budget = BUDGET.budget(kv_len - q_len)
    workload = Workload(batch=batch, q_len=q_len, kv_len=kv_len, budget=budget)
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
            known = "; ".join(", ".join(words) for words in choices.values())
            raise SpecError(f"--score {text!r}: {word!r} is none of its words; give at most one of each kind: {known}")
        if name in fields:
            raise SpecError(f"--score {text!r}: {fields[name]} and {word} are both of its {name}; give one")
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
        console().print(tables.neighbour_table(zip(near, today, strict=True)))
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
