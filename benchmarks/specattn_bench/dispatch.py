"""What does choosing a kernel cost? Import, reading packs, the first lookup of a process, and every later call's."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import click
from rich import box
from rich.table import Table

from specattn_bench import report
from specattn_codegen.processors import cpu_info

HELP = """Times dispatch in fresh processes: what a user pays before the first kernel runs, and again with every call.

\b
import  of specattn_runtime where torch is imported already
load    load_kernels: the processor is looked at and its packs are read
first   the first plan looked up in a process, an exact entry of the shipped pack for h100
hit     a call's built kernel, looked up again

Times of the processor are given too: they do not grow when other programs want the cores.

\b
Examples:
  specattn-bench dispatch
  specattn-bench dispatch --processes 20 --save
"""
LIMITS_US = {"import": 300e3, "first": 20.0, "hit": 2.0}

FRESH = """
import json, statistics, time, timeit, torch
def timed(run):
    wall, cpu = time.perf_counter(), time.process_time()
    result = run()
    return result, {"wall": (time.perf_counter() - wall) * 1e6, "cpu": (time.process_time() - cpu) * 1e6}
_, imported = timed(lambda: __import__("specattn_runtime"))
from specattn_codegen import HeadConfig, paths
from specattn_codegen.packs import ladder
from specattn_codegen.processors import gpus
from specattn_codegen.spec import KernelSpec, Workload
from specattn_runtime import load_kernels
heads = HeadConfig(num_q_heads=32, num_kv_heads=8, head_dim=128)
kernels, loaded = timed(lambda: load_kernels(heads))
packs = ladder.read(gpus.find("h100"), heads, (paths.shipped_packs_dir(),))
spec = KernelSpec(op="verify_attention", heads=heads, dtype="bfloat16", page_size=16)
found, first = timed(lambda: packs.find(spec, Workload(batch=1, q_len=7, kv_len=32768)))
assert found.rung == "exact", found.rung
kernels.prepare(max_q=8, max_kv=32768)
(spec, _), = kernels.rungs
look_up = lambda: kernels._kernel(spec, 1, 7, 30000, 0)
calls = 2000
def typical(timer):
    return statistics.median(timeit.repeat(look_up, timer=timer, number=calls, repeat=25)) / calls * 1e6
hit = {"wall": typical(time.perf_counter), "cpu": typical(time.process_time)}
print(json.dumps({"import": imported, "load": loaded, "first": first, "hit": hit}))
"""


@click.command("dispatch", help=HELP, short_help="Import, packs, and looking a kernel up.")
@click.option("--processes", default=9, show_default=True, type=click.IntRange(min=1), help="Fresh ones to time in.")
@click.option("--json", "json_path", type=click.Path(path_type=Path), metavar="PATH", help="Write the answer here.")
@click.option("--save", is_flag=True, help="Write the answer to benchmarks/results/<processor>/ of this checkout.")
def command(processes: int, json_path: Path | None, save: bool) -> None:
    arch = cpu_info.detect(measure=False)
    load = report.load_average()
    places = [*([json_path] if json_path else []), *([report.saved_path(arch, "dispatch")] if save else [])]
    for place in places:
        report.require_writable(place, "--save" if save else "--json")
    with report.Bar(processes) as bar:
        runs = []
        for _ in range(processes):
            runs.append(fresh_process())
            bar.advance()
    answers = [answer(step, [run[step] for run in runs]) for step in runs[0]]
    report.screen().print(table(answers))
    for place in places:
        report.write_json(place, {**report.header("dispatch", arch, load), "processes": processes, "answers": answers})


def fresh_process() -> Mapping[str, Mapping[str, float]]:
    """Microseconds of each step, on the wall and of the processor."""
    done = subprocess.run([sys.executable, "-c", FRESH], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def answer(step: str, runs: Sequence[Mapping[str, float]]) -> dict[str, object]:
    return {
        "step": step,
        "wall_us": round(statistics.median(run["wall"] for run in runs), 2),
        "wall_least_us": round(min(run["wall"] for run in runs), 2),
        "cpu_us": round(statistics.median(run["cpu"] for run in runs), 2),
        "limit_us": LIMITS_US.get(step),
    }


def table(answers: Sequence[Mapping[str, object]]) -> Table:
    made = Table(box=box.SIMPLE)
    for title in ("step", "median", "least", "of the processor", "to stay under"):
        made.add_column(title, justify="left" if title == "step" else "right")
    for one in answers:
        limit = one["limit_us"]
        made.add_row(
            str(one["step"]),
            *(f"{one[name]:,} us" for name in ("wall_us", "wall_least_us", "cpu_us")),
            "" if limit is None else f"{limit:,} us",
        )
    return made
