"""Timing with a clock of our own, and the copies that keep caches cold."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from specattn_codegen import build, cpu_info, measure, reference, space
from specattn_codegen.calls import problem_call
from specattn_codegen.check import check_attention
from specattn_codegen.heads import HeadConfig
from specattn_codegen.measure import Launch
from specattn_codegen.outcome import Timing
from specattn_codegen.problems import timing_problem, workload_problem
from specattn_codegen.render import render
from specattn_codegen.spec import KernelSpec, ScoreSpec, Workload

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
    assert second == Timing(median_us=7.0, p20_us=7.0, p80_us=7.0, n=first.n)


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


def timing(median_us: float, spread_us: float, n: int = 30) -> Timing:
    return Timing(median_us=median_us, p20_us=median_us - spread_us, p80_us=median_us + spread_us, n=n)


@pytest.mark.parametrize(
    ("candidate", "default", "better"),
    [
        (timing(90.0, 0.5), timing(100.0, 0.5), True),
        (timing(100.0, 0.5), timing(90.0, 0.5), False),
        (timing(99.5, 0.0), timing(100.0, 0.0), False),  # half a percent matters to nobody
        (timing(90.0, 40.0), timing(100.0, 40.0), False),  # inside the noise
        (timing(90.0, 40.0, n=100_000), timing(100.0, 40.0, n=100_000), True),  # noise that was averaged away
    ],
)
def test_better_means_by_more_than_noise(candidate: Timing, default: Timing, better: bool) -> None:
    assert measure.beats(candidate, default) is better


def test_the_standard_error_is_that_of_normal_samples() -> None:
    generator = torch.Generator().manual_seed(0)
    rounds = torch.randn(2000, 50, generator=generator, dtype=torch.float64) + 100.0
    summaries = [measure.summary(row.tolist()) for row in rounds]
    medians = torch.tensor([summary.median_us for summary in summaries], dtype=torch.float64)
    claimed = sum(map(measure.standard_error_us, summaries)) / len(summaries)
    assert claimed == pytest.approx(medians.std().item(), rel=0.1)


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
