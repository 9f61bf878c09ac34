"""How fast is every single plan of a search space? The ground that searches are compared on."""

from __future__ import annotations

import random
import time
from collections.abc import Iterable

import click

from specattn_bench import report, sweep_cases
from specattn_bench.sweep_cases import CASES, PAGE_SIZE, SearchCase, Sweep
from specattn_codegen import build, space
from specattn_codegen.digest import to_plain
from specattn_codegen.errors import SpecError
from specattn_codegen.kernel import Call, Kernel
from specattn_codegen.plan import Plan
from specattn_codegen.processors import cpu_info
from specattn_codegen.proof.prove import Extent, prove
from specattn_codegen.tuning.jobs import render_for
from specattn_codegen.tuning.measure import host_timer, rotating, summary, timed_calls

HELP = """Times every feasible plan of one search problem on this CPU, in rounds of a new random order each.

Every round is added to the file benchmarks/results/<processor>/sweep-CASE.json as it ends, so that a sweep may be made
in slices and stopped at any time. A plan's time in a round is the median of a few calls on data no cache holds; its
time is the median of its rounds, over which whatever else the machine does is spread. The first run proves every binary
against the float64 oracle.

\b
Examples:
  specattn-bench sweep verify-float32 --rounds 3
  specattn-bench sweep sparse-bfloat16 --build-only
"""
CALLS = 9
EXTENT = Extent(keys=0, ragged=600, rows=9)  # of the proofs


@click.command("sweep", help=HELP, short_help="Every plan of a search space, timed.")
@click.argument("name", type=click.Choice(list(CASES)))
@click.option("--rounds", default=1, show_default=True, type=click.IntRange(min=1), help="To add to the file.")
@click.option("--build-only", is_flag=True, help="Build and prove every binary; time nothing yet.")
def command(name: str, rounds: int, build_only: bool) -> None:
    case = CASES[name]
    arch = cpu_info.detect(measure=False)
    path = sweep_cases.sweep_path(arch, case)
    report.require_writable(path, "sweep")
    load = report.load_average()
    known = sweep_cases.read(path) if path.exists() else None
    default = space.default_plan(case.spec, arch, "cpu")
    plans = list(space.feasible(case.spec, arch, "cpu"))
    kernels = {plan: build.load(render_for(case.spec, plan, arch)) for plan in plans}
    if known is None:
        prove_each(case, kernels)
    if known is not None and set(known.rounds_us) != set(plans):
        raise SpecError(f"{path}: was made of another space; move it away")
    times = {plan: list(known.rounds_us[plan]) if known else [] for plan in plans}
    source = render_for(case.spec, default, arch).digest
    if known is not None and known.header.get("default_source_digest") != source:
        raise SpecError(f"{path}: was made of earlier kernels; move it away")
    made = {"case": to_plain(case), "calls": CALLS, "default_source_digest": source}
    header = {**report.header(f"sweep-{name}", arch, load), **made}
    sweep = Sweep(header=header, default=default, rounds_us=times)
    sweep_cases.write(path, sweep)
    if build_only:
        return
    calls = timed_calls(case.spec, case.workload, arch, page_size=PAGE_SIZE, seed=0)
    started = time.monotonic()
    first = len(times[plans[0]])
    for turn in range(first, first + rounds):
        for plan, median_us in one_round(kernels, calls, seed=turn):
            times[plan].append(median_us)
        sweep_cases.write(path, sweep)
    best = min(sweep.times_us.values())
    worst = max(sweep.times_us.values())
    click.echo(
        f"{name}: {len(plans)} plans, {first + rounds} rounds, {best:.1f} to {worst:.1f} us, a round typically "
        f"{sweep.noise:.1%} off; {time.monotonic() - started:.0f} s"
    )


def prove_each(case: SearchCase, kernels: dict[Plan, Kernel]) -> None:
    """One plan of every binary: those that share it differ by where a request's keys are dealt to tasks."""
    proved: set[str] = set()
    for plan, kernel in kernels.items():
        binary = str(plan.replace(split_keys=0))
        if binary in proved:
            continue
        proved.add(binary)
        verdict = prove(kernel, workload=case.workload, page_size=PAGE_SIZE, seed=0, device="cpu", extent=EXTENT)
        if not verdict.passed:
            raise SpecError(f"{case.name}, {plan}: {verdict.detail}")


def one_round(kernels: dict[Plan, Kernel], calls: tuple[Call, ...], seed: int) -> Iterable[tuple[Plan, float]]:
    order = list(kernels)
    random.Random(seed).shuffle(order)
    for plan in order:
        (launch,) = rotating([kernels[plan]], calls, "cpu")
        launch()
        yield plan, summary([host_timer(launch) for _ in range(CALLS)]).median_us
