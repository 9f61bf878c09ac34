"""Tuning end to end: real workers on a tiny head configuration, and the rules by which winners are chosen."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from imagined import Imagined
from specattn_codegen import environment, space
from specattn_codegen.build.resources import Resources
from specattn_codegen.cost_model import guess_resources, predict
from specattn_codegen.cost_model.floor import floor_us
from specattn_codegen.errors import BuildError
from specattn_codegen.heads import HeadConfig
from specattn_codegen.packs import ladder, pack
from specattn_codegen.packs.pack import Entry
from specattn_codegen.plan import Plan
from specattn_codegen.processors import cpu_info, gpus
from specattn_codegen.spec import KernelSpec, ScoreSpec, Workload
from specattn_codegen.tuning import record, tune_modelled
from specattn_codegen.tuning.measure import policy, summary
from specattn_codegen.tuning.outcome import Outcome, Status
from specattn_codegen.tuning.record import Record
from specattn_codegen.tuning.seeds import model_seeds
from specattn_codegen.tuning.shortlist import guessed_us
from specattn_codegen.tuning.tune import Method, plan_tasks, tune
from specattn_codegen.tuning.tune_measured import winner
from specattn_codegen.tuning.tune_session import Budget, Logbook, Target, Task, Trial, require_default
from specattn_codegen.tuning.workforce import Replay

HEADS = HeadConfig(num_q_heads=8, num_kv_heads=2, head_dim=32)
SELECT = KernelSpec(op="select_kv", heads=HEADS, selection="kv_head")
CPU_VERIFY = KernelSpec(op="verify_attention", heads=HEADS, score=ScoreSpec())
GPU_VERIFY = dataclasses.replace(CPU_VERIFY, dtype="bfloat16", page_size=16)
SIZES = (Workload(batch=1, q_len=3, kv_len=700), Workload(batch=4, q_len=3, kv_len=20_000))
H100 = Target(arch=gpus.find("h100"), backend="triton", is_present=False, page_size=16)


class Watcher:
    """Keeps what a run tells its listener."""

    def __init__(self) -> None:
        self.trials: list[Record] = []
        self.best: list[float | None] = []
        self.winners: list[Entry] = []
        self.proofs = 0

    def task_started(self, task: Task, trials: int) -> None:  # noqa: ARG002
        self.allowed = trials

    def trial_done(self, task: Task, trial: Record, best_us: float | None) -> None:  # noqa: ARG002
        self.trials.append(trial)
        self.best.append(best_us)

    def proving(self, task: Task, count: int) -> None:  # noqa: ARG002
        self.proofs += count

    def task_done(self, task: Task, winners: Sequence[Entry]) -> None:  # noqa: ARG002
        self.winners.extend(winners)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPECATTN_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path


def test_the_cpu_is_measured_and_a_second_run_repeats_no_trial(own_cache: Path) -> None:
    arch = dataclasses.replace(cpu_info.detect(measure=False), bandwidth_gbs=10.0, fp32_tflops=0.1, bf16_tflops=0.1)
    target = Target(arch=arch, backend="cpu", is_present=True, page_size=16)
    tasks = plan_tasks([(CPU_VERIFY, SIZES[:1]), (SELECT, SIZES[:1])], target)
    watcher = Watcher()
    tune(tasks, target, Budget(trials=2, seed=0), watcher, own_cache / "packs")

    assert [trial.outcome.status for trial in watcher.trials] == [Status.OK] * 4
    assert watcher.trials[0].plan == space.default_plan(CPU_VERIFY, arch, "cpu")
    saved = pack.load(pack.pack_path(own_cache / "packs", arch, HEADS)).entries
    assert set(saved) == set(watcher.winners)
    for entry in saved:
        assert (entry.chosen_by, entry.proved_by, entry.policy) == ("measured", "device", policy("eager"))
        assert entry.share_of_ceiling == pytest.approx(floor_us(entry.spec, entry.workload, arch) / entry.latency_us)
        found = ladder.lookup(entry.spec, entry.workload, arch, [own_cache / "packs"])
        assert found is not None
        assert found.plan == entry.plan
    recorded = record.read(record.records_path(arch, HEADS))
    assert len(recorded) == 4

    again = Watcher()
    tune(tasks, target, Budget(trials=2, seed=0), again, own_cache / "packs")
    assert again.trials == watcher.trials
    assert record.read(record.records_path(arch, HEADS)) == recorded


def test_an_absent_gpu_is_modelled_from_binaries_and_proved_in_the_interpreter(own_cache: Path) -> None:
    watcher, out = Watcher(), own_cache / "packs"
    tasks = plan_tasks([(GPU_VERIFY, SIZES)], H100)
    assert len(tasks) == 1
    tune(tasks, H100, Budget(trials=2, seed=0), watcher, out)

    assert {entry.workload for entry in watcher.winners} == set(SIZES)
    assert watcher.proofs >= 1
    for entry in watcher.winners:
        assert (entry.chosen_by, entry.proved_by) == ("modelled", "interpreter-float16-twin")
        merging = {"merge_splits"} if entry.plan["merge"] == "separate" else set[str]()
        assert {kernel.kernel for kernel in entry.resources} == {"attend_splits", "score_keys"} | merging
        assert all(kernel.registers > 0 and kernel.binary_bytes > 0 for kernel in entry.resources)
        predicted = predict(entry.spec, entry.workload, entry.plan, H100.arch, entry.resources)
        assert entry.latency_us == predicted.latency_us
        assert entry.environment.device is None
    recorded = record.read(record.records_path(H100.arch, HEADS))
    assert {one.stage for one in recorded} == {"compile", "interpret"}
    for one in recorded:
        if one.stage == "compile":
            assert set(one.predicted_us) == {workload.name for workload in SIZES}
    assert json.loads(pack.pack_path(out, H100.arch, HEADS).read_text())["entries"]


def test_no_time_at_all_tunes_nothing_and_writes_nothing(own_cache: Path) -> None:
    watcher = Watcher()
    tasks = plan_tasks([(SELECT, SIZES)], H100)
    tune(tasks, H100, Budget(trials=2, seed=0, ends_at=0.0), watcher, own_cache / "packs")
    assert watcher.trials == []
    assert not (own_cache / "packs").exists()


# -- choosing --------------------------------------------------------------------------------------------------------

DEFAULT, FAST, FASTER = (Plan.of("cpu", radix_bits=bits) for bits in (11, 8, 9))


def steady(median_us: float, workspace_bytes: int = 0, resources: tuple[Resources, ...] = ()) -> Outcome:
    """Timed without any noise."""
    timings = (summary([median_us] * 12),)
    return Outcome(status=Status.OK, timings=timings, workspace_bytes=workspace_bytes, resources=resources)


def test_the_default_stays_until_it_is_beaten() -> None:
    assert winner(DEFAULT, {DEFAULT: steady(100), FAST: steady(99.7)}) == DEFAULT
    assert winner(DEFAULT, {DEFAULT: steady(100), FAST: steady(90)}) == FAST
    assert winner(DEFAULT, {DEFAULT: steady(100), FAST: steady(90), FASTER: steady(80)}) == FASTER
    assert winner(DEFAULT, {FAST: steady(90)}) == FAST  # a default that failed cannot win


def test_ties_go_to_the_plan_that_takes_less_and_then_to_the_first_name() -> None:
    taken = guess_resources(GPU_VERIFY, space.default_plan(GPU_VERIFY, H100.arch, "triton"), H100.arch)
    more = tuple(dataclasses.replace(kernel, smem_bytes=kernel.smem_bytes + 1) for kernel in taken)
    registers = tuple(dataclasses.replace(kernel, registers=kernel.registers + 1) for kernel in taken)
    default = {DEFAULT: steady(100, resources=taken)}
    for tied in (
        {FAST: steady(80.0, resources=more), FASTER: steady(80.5, resources=taken)},
        {FAST: steady(80.0, resources=registers), FASTER: steady(80.5, resources=taken)},
        {FAST: steady(80.0, 2048), FASTER: steady(80.5, 1024)},
    ):
        assert winner(DEFAULT, {**default, **tied}) == FASTER
    assert winner(DEFAULT, {**default, FASTER: steady(80.0), FAST: steady(80.5)}) == min(FAST, FASTER, key=str)
    frugal = {FAST: steady(80.0, 2048), FASTER: steady(82.0, 1024)}
    assert winner(DEFAULT, {**default, **frugal}) == FAST  # beaten, so no tie
    # The fastest cannot be told from a plan that cannot be told from the default, which is then no better than that.
    close = {DEFAULT: steady(100.0), FAST: steady(98.5, 2048), FASTER: steady(99.2, 1024)}
    assert winner(DEFAULT, close) == FAST


def test_a_run_whose_kernels_differ_from_themselves_beats_no_default() -> None:
    restless = [80.0] * 3 + [90.0] * 3
    shaken = dataclasses.replace(steady(85), timings=(summary(restless * 200),))
    assert winner(DEFAULT, {DEFAULT: steady(94), FAST: shaken}) == DEFAULT
    assert winner(DEFAULT, {DEFAULT: steady(99), FAST: shaken}) == FAST


def compiled(*plans: Plan) -> dict[Plan, tuple[Resources, ...]]:
    return {plan: guess_resources(GPU_VERIFY, plan, H100.arch) for plan in plans}


def test_among_equal_predictions_the_default_then_the_best_over_all_sizes() -> None:
    task = Task(spec=GPU_VERIFY, workloads=SIZES)
    default = space.default_plan(GPU_VERIFY, H100.arch, "triton")
    everything = compiled(default, *model_seeds(task, H100))
    for workload in SIZES:
        times = {
            plan: predict(GPU_VERIFY, workload, plan, H100.arch, taken).latency_us for plan, taken in everything.items()
        }
        chosen = tune_modelled.choose(task, workload, everything, H100)
        assert chosen is not None
        assert times[chosen] <= min(times.values()) * (1 + tune_modelled.MODEL_ERROR)
        if times[default] <= min(times.values()) * (1 + tune_modelled.MODEL_ERROR):
            assert chosen == default
    assert tune_modelled.choose(task, SIZES[0], compiled(default), H100) == default
    assert tune_modelled.choose(task, SIZES[0], {}, H100) is None


@pytest.mark.usefixtures("own_cache")
@pytest.mark.parametrize(("spill_bytes", "ends_early"), [(0, True), (10_000, False)])
def test_a_modelled_search_ends_where_nothing_is_guessed_to_be_better(
    tmp_path: Path, spill_bytes: int, ends_early: bool
) -> None:
    task, trials, watcher = Task(spec=GPU_VERIFY, workloads=SIZES), 24, Watcher()
    tune([task], H100, Budget(trials=trials, seed=0), watcher, tmp_path, Method(workforce=Imagined(spill_bytes)))
    assert (len(watcher.trials) < trials) == ends_early
    for entry in watcher.winners:
        least = min(guessed_us(GPU_VERIFY, entry.workload, H100.arch, "triton").values())
        assert (entry.latency_us <= least * (1 + tune_modelled.MODEL_ERROR)) == ends_early


def test_the_models_seeds_are_its_best_for_each_size() -> None:
    task = Task(spec=GPU_VERIFY, workloads=SIZES)
    feasible = compiled(*space.feasible(GPU_VERIFY, H100.arch, "triton"))
    for workload, plan in zip(SIZES, model_seeds(task, H100), strict=False):
        best = min(
            predict(GPU_VERIFY, workload, other, H100.arch, taken).latency_us for other, taken in feasible.items()
        )
        assert predict(GPU_VERIFY, workload, plan, H100.arch, feasible[plan]).latency_us == best


@dataclass(slots=True)
class Refuting(Logbook):
    """A logbook whose interpreter refutes chosen plans."""

    refuted: set[Plan] = field(default_factory=set)
    asked: list[Plan] = field(default_factory=list)

    def run(self, pool: object, trials: Sequence[Trial], predict: object = None) -> list[Record]:  # noqa: ARG002
        self.asked.extend(trial.plan for trial in trials)
        wrong, right = (Outcome(status=status, worst_error=0.1) for status in (Status.WRONG, Status.OK))
        return [
            dataclasses.replace(self.blank(trial), outcome=wrong if trial.plan in self.refuted else right)
            for trial in trials
        ]


def test_a_winner_that_fails_its_proof_gives_way_to_the_next_best() -> None:
    task = Task(spec=GPU_VERIFY, workloads=SIZES[:1])
    plans = list(space.feasible(GPU_VERIFY, H100.arch, "triton"))[:40]
    everything = compiled(*plans)
    best = tune_modelled.choose(task, SIZES[0], everything, H100)
    assert best is not None
    second = tune_modelled.choose(
        task, SIZES[0], {plan: taken for plan, taken in everything.items() if plan != best}, H100
    )
    book = Refuting(H100, Path("never written"), environment.current("triton", None), refuted={best})
    with Replay([])("interpret") as pool:
        proved: dict[Plan, Record] = {}
        budget = Budget(trials=1, seed=0)
        tune_modelled.prove_winners(task, everything, proved, H100, budget, book, Watcher(), pool)
        (entry,) = tune_modelled.proved_entries(task, everything, proved, H100, book)
        assert book.asked == [best, second]
        assert entry.plan == second
        book.refuted = set(everything)
        none_proved: dict[Plan, Record] = {}
        tune_modelled.prove_winners(task, everything, none_proved, H100, budget, book, Watcher(), pool)
        assert tune_modelled.proved_entries(task, everything, none_proved, H100, book) == []


@pytest.mark.usefixtures("own_cache")
def test_a_default_that_does_not_build_is_the_machines_fault() -> None:
    book = Logbook.open(H100, HEADS)
    job = tune_modelled.compile_trial(SELECT, space.default_plan(SELECT, H100.arch, "triton"), H100)
    outcome = Outcome(status=Status.COMPILE, detail="no compiler; install one")
    failed = dataclasses.replace(book.blank(job), outcome=outcome)
    with pytest.raises(BuildError, match="no compiler; install one"):
        require_default(failed)
