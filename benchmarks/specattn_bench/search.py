"""How many trials does each search need? Replayed on sweeps, in which every plan's time is known."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import click
from rich import box
from rich.table import Table

from specattn_bench import report, sweep_cases
from specattn_bench.sweep_cases import CASES, SearchCase, Sweep
from specattn_codegen.cost_model import predict
from specattn_codegen.digest import to_plain
from specattn_codegen.errors import SpecError
from specattn_codegen.plan import Plan
from specattn_codegen.processors import cpu_info
from specattn_codegen.processors.arch import Arch
from specattn_codegen.tuning.search import LEARNERS, SAMPLERS, Sampler, Search, Searched, Strategy
from specattn_codegen.tuning.seeds import MODEL_SEEDS
from specattn_codegen.tuning.tune_measured import BATCH

HELP = """Replays searches on the sweeps of this processor, which `specattn-bench sweep` made: nothing is timed.

Each search gets the times it asks for, as many plans at once as in tuning. What counts is how far its best plan so far
is from the best there is, the median over seeds. `within` is the trials until it is that close; `never` where the
trials did not suffice. Every search begins with the default plan, but for `blind`: plans in a random order, by count.

\b
Examples:
  specattn-bench search
  specattn-bench search --case verify-bfloat16 --sampler gp --trials 200
"""
WITHIN = (0.03, 0.01)  # of the best plan
CHECKED_AT = (20, 40, 60)  # trials


@click.command("search", help=HELP, short_help="Samplers compared on recorded sweeps.")
@click.option("--case", "cases", multiple=True, type=click.Choice(list(CASES)), help="May be repeated.  [default: all]")
@click.option("--sampler", "samplers", multiple=True, type=click.Choice(SAMPLERS), help="May be repeated.")
@click.option("--trials", default=400, show_default=True, type=click.IntRange(min=1), help="At most, of each search.")
@click.option("--seeds", default=5, show_default=True, type=click.IntRange(min=1), help="Searches of each kind.")
@click.option("--save", is_flag=True, help="Write the answer to benchmarks/results/<processor>/ of this checkout.")
def command(cases: tuple[str, ...], samplers: tuple[Sampler, ...], trials: int, seeds: int, save: bool) -> None:
    load = report.load_average()
    arch = cpu_info.detect(refresh=True)  # its rates are what the cost model ranks by, in tuning too
    answers = [
        answer
        for name in cases or tuple(CASES)
        for answer in compare(CASES[name], sweep_of(arch, CASES[name]), arch, samplers or SAMPLERS, trials, seeds)
    ]
    report.screen().print(table(answers))
    for name, regret in {answer["case"]: answer["model_first_regret"] for answer in answers}.items():
        click.echo(f"{name}: the cost model's first choice is {regret:.1%} above the best")
    if save:
        path = report.saved_path(arch, "search")
        asked = {(answer["case"], answer["sampler"]) for answer in answers}
        kept = [one for one in _answers(path) if (one["case"], one["sampler"]) not in asked]
        rates = {name: getattr(arch, name) for name in cpu_info.RATES}
        found = {"label": "replayed", "rates": rates, "within": WITHIN, "answers": [*kept, *answers]}
        report.write_json(path, {**report.header("search", arch, load), **found})


def _answers(path: Path) -> list[dict[str, object]]:
    """Of an earlier run, which stay for the cases and samplers this one has not asked about."""
    return json.loads(path.read_text())["answers"] if path.exists() else []


def sweep_of(arch: Arch, case: SearchCase) -> Sweep:
    path: Path = sweep_cases.sweep_path(arch, case)
    if not path.exists():
        raise SpecError(f"--case {case.name}: {path} does not exist; make it with specattn-bench sweep {case.name}")
    return sweep_cases.read(path)


def compare(
    case: SearchCase, sweep: Sweep, arch: Arch, samplers: Sequence[Sampler], trials: int, seeds: int
) -> list[dict[str, object]]:
    """One answer a sampler, for those that learn with the cost model's seeds and without, and one for none."""
    times = sweep.times_us
    best = min(times, key=times.__getitem__)
    order = sorted(times, key=lambda plan: predict(case.spec, case.workload, plan, arch, ()).latency_us)
    hints = order[:MODEL_SEEDS]
    known = {
        "case": case.name,
        "feasible": len(times),
        "best_us": times[best],
        "noise": sweep.noise,
        "within_reach": sum(time <= times[best] * (1 + max(WITHIN)) for time in times.values()),
        "model_first_regret": times[order[0]] / times[best] - 1,
        "plan": to_plain(dict(best.settings)),
    }
    answers: list[dict[str, object]] = []
    for sampler in samplers:
        for seeded in (True, False) if sampler in LEARNERS else (False,):
            curves = [
                regrets(times, search(sweep.space, sampler, hints if seeded else [], trials, seed))
                for seed in range(seeds)
            ]
            answers.append({**known, "sampler": sampler, "seeded": seeded, "trials": trials, **found(curves)})
    return [*answers, {**known, "sampler": "blind", "seeded": False, **blind(times)}]


def found(curves: Sequence[Sequence[float]]) -> dict[str, object]:
    """Medians over searches of one kind."""
    return {
        "regret": {str(at): statistics.median(curve[min(at, len(curve)) - 1] for curve in curves) for at in CHECKED_AT},
        "trials_within": {f"{share:.0%}": _median_trials(curves, share) for share in WITHIN},
    }


def search(searched: Searched, sampler: Sampler, hints: Sequence[Plan], trials: int, seed: int) -> Search:
    # One fewer than there are: a search that may try all of them sweeps, in the order of the axes.
    strategy = Strategy(sampler=sampler, trials=min(trials, len(searched.feasible) - 1), seed=seed)
    return Search(searched, seeds=hints, strategy=strategy)


def regrets(times: Mapping[Plan, float], search: Search) -> list[float]:
    """After each trial, how much slower the best plan so far is than the best there is. Stops where it is found."""
    best, so_far, curve = min(times.values()), float("inf"), list[float]()
    while plans := search.ask(BATCH):
        for plan in plans:
            search.tell(plan, times[plan])
            so_far = min(so_far, times[plan])
            curve.append(so_far / best - 1)
        if so_far == best:
            break
    return curve


def blind(times: Mapping[Plan, float]) -> dict[str, dict[str, float]]:
    """What every other random order of the plans gives, the default nowhere in particular."""
    ordered = sorted(times.values())

    def misses(good: int, trials: int) -> bool:
        """Whether more than half of the orders have none of the `good` best plans among their first."""
        return 2 * math.comb(len(ordered) - good, trials) > math.comb(len(ordered), trials)

    best_of = {at: next(good for good in range(1, len(ordered) + 1) if not misses(good, at)) for at in CHECKED_AT}
    enough = {share: sum(time <= ordered[0] * (1 + share) for time in ordered) for share in WITHIN}
    return {
        "regret": {str(at): ordered[good - 1] / ordered[0] - 1 for at, good in best_of.items()},
        "trials_within": {
            f"{share:.0%}": next(trials for trials in range(1, len(ordered) + 1) if not misses(good, trials))
            for share, good in enough.items()
        },
    }


def _median_trials(curves: Sequence[Sequence[float]], share: float) -> float | None:
    """Trials until the best so far is that close; None where most searches never came so close."""
    needed = [next((at + 1 for at, regret in enumerate(curve) if regret <= share), None) for curve in curves]
    found = sorted(count if count is not None else float("inf") for count in needed)
    middle = statistics.median(found)
    return None if middle == float("inf") else middle


def table(answers: Sequence[dict[str, object]]) -> Table:
    shown = Table(box=box.SIMPLE)
    for title in (
        "case",
        "plans",
        "sampler",
        "seeds",
        *(f"after {at}" for at in CHECKED_AT),
        *(f"within {share:.0%}" for share in WITHIN),
    ):
        shown.add_column(title, justify="left" if title in ("case", "sampler", "seeds") else "right", no_wrap=True)
    for answer in answers:
        regret, within = answer["regret"], answer["trials_within"]
        shown.add_row(
            str(answer["case"]),
            str(answer["feasible"]),
            str(answer["sampler"]),
            "model" if answer["seeded"] else "",
            *(f"{value:.1%}" for value in regret.values()) if isinstance(regret, dict) else (),
            *("never" if needed is None else f"{needed:g}" for needed in within.values())
            if isinstance(within, dict)
            else (),
        )
    return shown
