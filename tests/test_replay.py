"""The whole tuner on recorded trials: what it finds, what it makes of gaps, offenders and ties. Nothing is built."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from specattn_bench import endurance
from specattn_bench.endurance import pretended
from specattn_codegen import environment, space
from specattn_codegen.cli import tune as cli
from specattn_codegen.heads import HeadConfig
from specattn_codegen.packs.pack import Entry
from specattn_codegen.plan import Plan
from specattn_codegen.processors import cpu_info
from specattn_codegen.spec import KernelSpec, Workload
from specattn_codegen.tuning import record
from specattn_codegen.tuning.outcome import DIED, HUNG, POISONED, Outcome, Status
from specattn_codegen.tuning.record import Record
from specattn_codegen.tuning.search import SAMPLERS, Sampler, Search, Strategy, space_of
from specattn_codegen.tuning.tune_measured import tune_measured
from specattn_codegen.tuning.tune_session import OFFENCES, Budget, Logbook, Target, Task, measure_trial
from specattn_codegen.tuning.workforce import Replay

HEADS = HeadConfig(num_q_heads=8, num_kv_heads=2, head_dim=32)
SPEC = KernelSpec(op="sparse_attention", heads=HEADS, selection="kv_head")
SIZE = Workload(batch=1, q_len=1, kv_len=4096, budget=300)
TASK = Task(spec=SPEC, workloads=(SIZE,))


def target() -> Target:
    arch = dataclasses.replace(cpu_info.detect(measure=False), bandwidth_gbs=10.0, fp32_tflops=0.1, bf16_tflops=0.1)
    return Target(arch=arch, backend="cpu", is_present=True, page_size=16)


def logbook() -> Logbook:
    return Logbook(target(), None, environment.current("cpu", "a test"))


def recorded(plans: Sequence[Plan]) -> list[Record]:
    book = logbook()
    trials = [measure_trial(SPEC, plan, SIZE, target(), seed=0, seconds=1.0) for plan in plans]
    return [dataclasses.replace(book.blank(trial), outcome=pretended(trial.job)) for trial in trials]


class Winners:
    def __init__(self) -> None:
        self.trials: list[Record] = []
        self.found: list[Entry] = []

    def task_started(self, task: Task, trials: int) -> None: ...

    def trial_done(self, task: Task, trial: Record, best_us: float | None) -> None:  # noqa: ARG002
        self.trials.append(trial)

    def proving(self, task: Task, count: int) -> None: ...

    def task_done(self, task: Task, winners: Sequence[Entry]) -> None:  # noqa: ARG002
        self.found.extend(winners)


def tuned(trials: Sequence[Record], sampler: Sampler, count: int) -> Winners:
    def search_for(task: Task) -> Search:
        strategy = Strategy(sampler=sampler, trials=count, seed=0)
        return Search(space_of(task.spec, target().arch, "cpu"), seeds=(), strategy=strategy)

    listener = Winners()
    budget = Budget(trials=count, seed=0)
    tune_measured([TASK], target(), budget, logbook(), listener, lambda _: None, search_for, Replay(trials))
    return listener


def test_a_sweep_of_recorded_trials_finds_the_best() -> None:
    plans = list(space.feasible(SPEC, target().arch, "cpu"))
    trials = recorded(plans)
    (winner,) = tuned(trials, "tpe", len(plans)).found
    times = {trial.plan: trial.outcome.timings[0].median_us for trial in trials}
    assert winner.latency_us == times[winner.plan] <= 1.01 * min(times.values())  # closer is a tie


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_tunes_and_tries_nothing_twice(sampler: Sampler) -> None:
    trials = recorded(list(space.feasible(SPEC, target().arch, "cpu")))
    seen = tuned(trials, sampler, 14)
    plans = [trial.plan for trial in seen.trials]
    assert len(plans) == len(set(plans)) == 14
    assert plans[0] == space.default_plan(SPEC, target().arch, "cpu")
    assert len(seen.found) == 1


def test_what_was_not_recorded_is_no_candidate() -> None:
    plans = list(space.feasible(SPEC, target().arch, "cpu"))
    default = space.default_plan(SPEC, target().arch, "cpu")
    seen = tuned(recorded([default, *plans[:20]]), "random", 30)
    known = {default, *plans[:20]}
    for trial in seen.trials:
        assert (trial.outcome.status is Status.OK) == (trial.plan in known)
    (winner,) = seen.found
    assert winner.plan in known


@pytest.mark.parametrize("detail", [f"{DIED}was killed by SIGSEGV", f"{POISONED}illegal address", f"{HUNG}60 s"])
def test_a_binary_that_kills_hangs_or_poisons_workers_is_not_run_again(detail: str, tmp_path: Path) -> None:
    status = Status.TIMEOUT if detail.startswith(HUNG) else Status.RUNTIME
    plans = [plan for plan in space.feasible(SPEC, target().arch, "cpu") if plan["key_tile"] == 32]
    plans = [plan for plan in plans if plan["prefetch"] == "none"]  # they differ by their splits, and share a binary
    offenders = [
        dataclasses.replace(trial, outcome=Outcome(status=status, detail=detail))
        for trial in recorded(plans[:OFFENCES])
    ]
    path = tmp_path / "records.jsonl"
    for one in offenders:
        record.append(path, one)
    book = Logbook.open(target(), HEADS, path)
    trial = measure_trial(SPEC, plans[-1], SIZE, target(), seed=0, seconds=1.0)
    (refused,) = book.run(Replay(recorded(plans)), [trial])  # which would say that all is well
    assert refused.outcome.status is Status.RUNTIME
    assert refused.outcome.detail.startswith("quarantined")
    assert record.read(path) == offenders


def test_the_command_replays_a_file_and_writes_no_pack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "records.jsonl"
    for trial in recorded(list(space.feasible(SPEC, target().arch, "cpu"))[::5]):
        record.append(path, trial)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setattr("sys.argv", ["specattn-tune", "--replay", str(path), "--trials", "1000"])
    cli.main()
    shown = capsys.readouterr().out
    (above,) = re.findall(rf"{SPEC.name} {SIZE.name}: (.*)% above the best recorded plan", shown)
    assert float(above) <= 1.0  # closer is a tie
    assert not (tmp_path / "config").exists()


def test_runs_killed_at_random_instants_lose_nothing(tmp_path: Path) -> None:
    losses = endurance.endure(tmp_path, kills=6, seed=1)
    assert losses.kills == 6
    assert (losses.lost, losses.corrupt, losses.repeated) == (0, 0, 0)
