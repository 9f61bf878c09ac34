"""Timing with a clock of our own, and the copies that keep caches cold."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from specattn_codegen import build, space
from specattn_codegen.calls import problem_call
from specattn_codegen.heads import HeadConfig
from specattn_codegen.kernel import Call
from specattn_codegen.processors import cpu_info
from specattn_codegen.proof import reference
from specattn_codegen.proof.check import check_attention
from specattn_codegen.proof.problems import timing_problem, workload_problem
from specattn_codegen.render import render
from specattn_codegen.spec import KernelSpec, ScoreSpec, Workload
from specattn_codegen.tuning import measure
from specattn_codegen.tuning.measure import Launch
from specattn_codegen.tuning.outcome import Timing

HEADS = HeadConfig(num_q_heads=4, num_kv_heads=2, head_dim=16)
VERIFY = KernelSpec(op="verify_attention", heads=HEADS)
CPU = cpu_info.detect(measure=False)


class Machine:
    """A machine whose every launch takes what it is told, and whose clock shows it."""

    def __init__(self, durations_us: dict[str, list[float]]) -> None:
        self.durations_us = durations_us
        self.now_us = 0.0
        self.log: list[str] = []

    def launch(self, name: str) -> Launch:
        return lambda: self.run(name)

    def run(self, name: str) -> None:
        self.log.append(name)
        durations = self.durations_us[name]
        self.now_us += durations[self.log.count(name) % len(durations)]

    def timer(self, launch: Launch) -> float:
        before = self.now_us
        launch()
        return self.now_us - before

    def clock(self) -> float:
        return self.now_us / 1e6


def test_medians_and_percentiles_of_what_the_clock_showed() -> None:
    machine = Machine({"a": [10.0, 20.0, 30.0, 40.0, 50.0], "b": [7.0]})
    first, second = measure.time_interleaved(
        [machine.launch("a"), machine.launch("b")], seconds=2e-3, timer=machine.timer, clock=machine.clock
    )
    assert first.median_us == 30.0
    assert 10.0 <= first.p20_us <= 20.0
    assert 40.0 <= first.p80_us <= 50.0
    assert second == Timing(median_us=7.0, low_us=7.0, high_us=7.0, p20_us=7.0, p80_us=7.0, n=first.n, noise_floor=0.0)


def test_kernels_take_turns_in_short_blocks_after_a_warm_up() -> None:
    machine = Machine({"a": [1.0], "b": [1.0]})
    measure.time_interleaved(
        [machine.launch("a"), machine.launch("b")], seconds=0.0, timer=machine.timer, clock=machine.clock
    )
    block = ["a"] * measure.BLOCK + ["b"] * measure.BLOCK
    rounds = measure.LEAST_CALLS // measure.BLOCK
    assert machine.log == ["a"] * measure.WARM_UP + ["b"] * measure.WARM_UP + block * rounds


def test_time_and_patience_end_a_measurement() -> None:
    slow, fast = Machine({"a": [1e6]}), Machine({"a": [1.0]})
    (timing,) = measure.time_interleaved([slow.launch("a")], seconds=0.5, timer=slow.timer, clock=slow.clock)
    assert timing.n == measure.LEAST_CALLS
    (timing,) = measure.time_interleaved([fast.launch("a")], seconds=1.0, timer=fast.timer, clock=fast.clock)
    assert timing.n == measure.MOST_CALLS


def test_something_is_done_between_rounds_of_blocks_and_never_within_one() -> None:
    machine = Machine({"a": [1.0], "b": [1.0]})
    measure.time_interleaved(
        [machine.launch("a"), machine.launch("b")],
        seconds=0.0,
        timer=machine.timer,
        clock=machine.clock,
        between=lambda: machine.log.append("between"),
    )
    rounds = "".join(machine.log[2 * measure.WARM_UP :]).split("between")
    assert rounds == ["aaabbb"] * (measure.LEAST_CALLS // measure.BLOCK) + [""]


def timing(median_us: float, error_us: float) -> Timing:
    """Of a kernel whose median is known within a standard error."""
    half = measure.CONFIDENT_ERRORS * error_us
    low, high = median_us - half, median_us + half
    return Timing(median_us=median_us, low_us=low, high_us=high, p20_us=low, p80_us=high, n=30, noise_floor=0.0)


@pytest.mark.parametrize(
    ("candidate", "default", "better"),
    [
        (timing(90.0, 0.5), timing(100.0, 0.5), True),
        (timing(100.0, 0.5), timing(90.0, 0.5), False),
        (timing(99.5, 0.0), timing(100.0, 0.0), False),  # half a percent matters to nobody
        (timing(90.0, 3.0), timing(100.0, 3.0), False),  # inside the noise: three errors of the difference are 12.7
        (timing(90.0, 2.0), timing(100.0, 2.0), True),
    ],
)
def test_better_means_by_more_than_noise(candidate: Timing, default: Timing, better: bool) -> None:
    assert measure.beats(candidate, default) is better


def test_what_differs_from_itself_beats_nothing_by_less() -> None:
    assert measure.beats(timing(90.0, 0.5), timing(100.0, 0.5), noise_floor=0.09)
    assert not measure.beats(timing(90.0, 0.5), timing(100.0, 0.5), noise_floor=0.11)


def test_intervals_hold_the_median_of_normal_samples() -> None:
    generator = torch.Generator().manual_seed(0)
    rounds = 100.0 + torch.randn(400, 60, generator=generator, dtype=torch.float64)
    summaries = [measure.summary(row.tolist()) for row in rounds]
    held = sum(summary.low_us <= 100.0 <= summary.high_us for summary in summaries)
    assert 0.90 < held / len(summaries) <= 0.98  # 95 %, within four deviations of 400 draws and the method's own bias
    claimed = sum(map(measure.standard_error_us, summaries)) / len(summaries)
    deviation = torch.tensor([summary.median_us for summary in summaries]).std().item()
    assert claimed == pytest.approx(deviation, rel=0.15)


def test_calls_of_one_block_that_are_slow_together_count_as_one() -> None:
    generator = torch.Generator().manual_seed(1)
    moods = torch.randn(40, 1, generator=generator, dtype=torch.float64)
    alone = 100.0 + moods.expand(-1, measure.BLOCK)
    shuffled = alone.flatten()[torch.randperm(alone.numel(), generator=generator)]
    together = measure.summary(alone.flatten().tolist())
    mixed = measure.summary(shuffled.tolist())
    assert together.median_us == mixed.median_us
    assert measure.standard_error_us(together) > 1.3 * measure.standard_error_us(mixed)  # the square root of 3 at best


def test_the_noise_floor_is_how_far_a_kernel_is_from_itself() -> None:
    steady = [100.0] * measure.BLOCK
    assert measure.summary(steady * 4).noise_floor == 0.0
    lame = [110.0] * measure.BLOCK
    assert measure.summary((steady + lame) * 3).noise_floor == pytest.approx(10.0 / 105.0)


class Kernel:
    """Keeps what it is asked to launch."""

    spec, plan = VERIFY, space.default_plan(VERIFY, CPU, "cpu")

    def __init__(self) -> None:
        self.launched: list[int] = []

    def workspace_bytes(self, call: Call) -> int:  # noqa: ARG002
        return 64

    def launch(self, call: Call, workspace: torch.Tensor) -> None:
        assert workspace.numel() == 64
        self.launched.append(id(call))


def test_graphs_are_captured_once_a_call_and_replayed_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = workload_problem(VERIFY, Workload(batch=1, q_len=1, kv_len=20), page_size=16, seed=0)
    calls = [problem_call(VERIFY, turn) for turn in measure.rotated(problem, 3)]
    kernels, captured = [Kernel(), Kernel()], list[Launch]()

    def capture(launch: Launch) -> Launch:
        captured.append(launch)
        return launch

    monkeypatch.setattr(measure, "captured", capture)
    eager = measure.rotating(kernels, calls, "cpu")
    assert not captured
    graphs = measure.rotating(kernels, calls, "cpu", "graph")
    assert len(captured) == len(kernels) * len(calls)
    for first, second in (eager, graphs):
        for launch in (first, second, first, second):
            launch()
        assert [kernel.launched for kernel in kernels] == [[id(calls[0]), id(calls[2])], [id(calls[1]), id(calls[0])]]
        for kernel in kernels:
            kernel.launched.clear()
    assert len({measure.policy(mode) for mode in measure.MODES}) == len(measure.MODES)


def test_rotated_problems_are_the_same_problem_over_different_pages() -> None:
    problem = workload_problem(VERIFY, Workload(batch=3, q_len=2, kv_len=50), page_size=16, seed=0)
    turns = measure.rotated(problem, 4)
    used: set[int] = set()
    for turn in turns:
        for request in range(3):
            pages = set(turn.page_table[request, :4].tolist())
            assert not pages & used
            used |= pages
            for cache in ("k_cache", "v_cache"):
                args = (turn.page_table[request], torch.arange(50))
                original = (problem.page_table[request], torch.arange(50))
                assert torch.equal(
                    reference.gather_keys(getattr(turn, cache), *args),
                    reference.gather_keys(getattr(problem, cache), *original),
                )
    assert torch.equal(turns[0].page_table[:, 4:], problem.page_table[:, 4:])  # wild entries stay wild
    assert turns[0].k_cache.data_ptr() == turns[3].k_cache.data_ptr()


def test_copies_fill_the_last_level_cache_and_fit_the_memory() -> None:
    arch = dataclasses.replace(cpu_info.detect(measure=False), l2_bytes=100 << 20, memory_bytes=1 << 30)
    size = 10 << 20
    count = measure.copies(size, arch)
    assert (count - 1) * size >= measure.CACHES_FILLED * arch.l2_bytes
    assert measure.copies(200 << 20, arch) == 1  # a second copy would take over a quarter of the memory
    assert measure.copies(1, arch) == measure.MOST_COPIES


TIMED = (
    VERIFY,
    KernelSpec(op="verify_attention", heads=HEADS, score=ScoreSpec(normaliser="reference")),
    KernelSpec(op="sparse_attention", heads=HEADS, selection="kv_head"),
    KernelSpec(op="mixed_attention", heads=HEADS, selection="layer"),
    KernelSpec(op="verify_attention", heads=dataclasses.replace(HEADS, sinks=True), kv_dtype="float8_e4m3"),
)


@pytest.mark.parametrize("spec", TIMED, ids=lambda spec: spec.name)
def test_what_is_timed_is_a_problem_like_any_other(spec: KernelSpec) -> None:
    workload = Workload(batch=2, q_len=3, kv_len=53, budget=9 if spec.selection else 0)
    problem = timing_problem(spec, workload, page_size=16, seed=3, device="cpu")
    call = problem_call(spec, problem)
    kernel = build.load(render(spec, space.default_plan(spec, CPU, "cpu"), CPU.target))
    kernel.launch(call, torch.empty(kernel.workspace_bytes(call), dtype=torch.uint8))
    verdict = check_attention(spec, problem, call.out, call.lse, call.scores)
    assert verdict.passed, verdict.detail
    assert sorted(problem.page_table.flatten().tolist()) == list(range(8))
    if problem.indices is not None and problem.counts is not None:
        assert (problem.counts == 9).all()
        assert (problem.indices.diff(dim=-1) > 0).all()
        assert int(problem.indices.max()) < int(problem.tail_start[0]) == 50
