"""Timing: medians over interleaved blocks, on data that no cache holds. Never checks a result."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import numpy as np
import torch

from specattn_codegen.calls import problem_call, select_call
from specattn_codegen.kernel import Call, Kernel
from specattn_codegen.policy import TopK
from specattn_codegen.processors import huge_pages
from specattn_codegen.processors.arch import Arch
from specattn_codegen.proof.problems import AttentionProblem, random_scores, timing_problem
from specattn_codegen.spec import KernelSpec, Workload
from specattn_codegen.tuning.outcome import Timing

WARM_UP = 2
BLOCK = 3  # calls of one kernel before the next kernel has its turn
LEAST_CALLS = 6
MOST_CALLS = 300
CACHES_FILLED = 2.0  # the data touched between two uses of the same bytes, in last-level caches
MOST_COPIES = 512
SPIN_CYCLES = 400_000  # some 200 microseconds, longer than a host takes for the launches of a call
MEMORY_SHARE = 0.25  # of the device's memory that copies may take
RESAMPLES = 1000  # of the bootstrap
CONFIDENCE = 0.95
CONFIDENT_ERRORS = 1.96  # standard errors on either side that hold CONFIDENCE of a normal distribution

# eager: launched one by one, behind a spin on a GPU; graph: as a replay of a CUDA graph.
Mode = Literal["eager", "graph"]
MODES: tuple[Mode, ...] = get_args(Mode)

Launch = Callable[[], object]
Timer = Callable[[Launch], float]  # microseconds of one launch


def policy(mode: Mode) -> str:
    """What a time means: part of a record's identity, to be changed with anything here that changes it."""
    how = {"eager": "launched one by one", "graph": "a CUDA graph"}
    return f"interleaved blocks, data in turns, huge pages on a host, pinned threads, {how[mode]}, median"


def time_interleaved(
    launches: Sequence[Launch],
    *,
    seconds: float,
    timer: Timer,
    clock: Callable[[], float] = time.monotonic,
    between: Callable[[], None] = lambda: None,
) -> tuple[Timing, ...]:
    """One Timing per launch. They take turns in short blocks, so that a machine that slows down slows all of them.

    seconds  for all launches together; at least LEAST_CALLS calls of each are made however long they take
    between  is called when every launch has had its block
    """
    for launch in launches:
        for _ in range(WARM_UP):
            timer(launch)
    samples: list[list[float]] = [[] for _ in launches]
    end = clock() + seconds
    while len(samples[0]) < LEAST_CALLS or (clock() < end and len(samples[0]) < MOST_CALLS):
        for kept, launch in zip(samples, launches, strict=True):
            kept.extend(timer(launch) for _ in range(BLOCK))
        between()
    return tuple(map(summary, samples))


def summary(samples: Sequence[float]) -> Timing:
    """Of calls in the order they were made, BLOCK in a row."""
    fifths = statistics.quantiles(samples, n=5, method="inclusive")
    median = statistics.median(samples)
    low, high = median_interval(samples)
    blocks = [samples[start : start + BLOCK] for start in range(0, len(samples), BLOCK)]
    halves = [statistics.median(itertools.chain.from_iterable(blocks[turn::2])) for turn in range(min(2, len(blocks)))]
    return Timing(
        median_us=median,
        low_us=low,
        high_us=high,
        p20_us=fifths[0],
        p80_us=fifths[3],
        n=len(samples),
        noise_floor=abs(halves[0] - halves[-1]) / median,
    )


def median_interval(samples: Sequence[float]) -> tuple[float, float]:
    """Where the median lies with CONFIDENCE, by the circular block bootstrap (Politis and Romano, 1992): calls of one
    block share the machine's mood, so blocks are drawn and not calls."""
    values = np.asarray(samples)
    blocks = math.ceil(len(values) / BLOCK)
    starts = np.random.default_rng(0).integers(0, len(values), (RESAMPLES, blocks, 1))
    drawn = ((starts + np.arange(BLOCK)) % len(values)).reshape(RESAMPLES, -1)[:, : len(values)]
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(np.median(values[drawn], axis=1), (tail, 1 - tail))
    return float(low), float(high)


def standard_error_us(timing: Timing) -> float:
    """Of the median, as its interval says."""
    return (timing.high_us - timing.low_us) / (2 * CONFIDENT_ERRORS)


def beats(
    timing: Timing, other: Timing, *, noise_floor: float = 0.0, least_gain: float = 0.01, errors: float = 3.0
) -> bool:
    """Whether a timing is better than another by more than noise, and by enough to matter.

    noise_floor  share by which a kernel differs from itself in the same run
    """
    gain = other.median_us - timing.median_us
    noise = errors * math.hypot(standard_error_us(timing), standard_error_us(other))
    return gain > noise and gain > max(least_gain, noise_floor) * other.median_us


def host_timer(launch: Launch) -> float:
    start = time.perf_counter_ns()
    launch()
    return (time.perf_counter_ns() - start) / 1e3


def device_timer(launch: Launch) -> float:
    """Times with events behind a kernel that only spins, so that the host has launched everything before the device
    begins. Nothing is written to clear the L2: what is dirty there would have to be written back on our time."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(SPIN_CYCLES)
    start.record()
    launch()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3


def timer_for(arch: Arch) -> Timer:
    return device_timer if arch.is_gpu else host_timer


def rotating(kernels: Sequence[Kernel], calls: Sequence[Call], device: str, mode: Mode = "eager") -> list[Launch]:
    """A launch for each kernel. They take the calls in turns together, so that none finds what the one before it has
    just brought into a cache."""
    turns = itertools.cycle(range(len(calls)))

    def rotate(kernel: Kernel) -> Launch:
        workspace = torch.empty(max(map(kernel.workspace_bytes, calls)), dtype=torch.uint8, device=device)
        launches: list[Launch] = [functools.partial(kernel.launch, call, workspace) for call in calls]
        if mode == "graph":
            launches = [captured(launch) for launch in launches]

        def take_turn() -> object:
            return launches[next(turns)]()

        return take_turn

    return [rotate(kernel) for kernel in kernels]


def captured(launch: Launch) -> Launch:
    """The replay of one CUDA graph of what `launch` does."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # a Triton kernel is machine code only after its first launch
        launch()
        launch()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    return graph.replay


def device_of(arch: Arch) -> str:
    """Where torch has the memory of a processor that is here."""
    return "cuda" if arch.is_gpu else "cpu"


def timed_calls(spec: KernelSpec, workload: Workload, arch: Arch, *, page_size: int, seed: int) -> tuple[Call, ...]:
    """Equal calls over different memory, enough of it that no cache still holds a call's data at its next turn."""
    device = device_of(arch)
    if spec.op == "select_kv":
        return _selection_calls(spec, workload, arch, seed, device)
    problem = timing_problem(spec, workload, page_size=page_size, seed=seed, device=device)
    size = problem.k_cache.nbytes + problem.v_cache.nbytes
    return tuple(problem_call(spec, turn) for turn in rotated(problem, copies(size, arch)))


def copies(size_bytes: int, arch: Arch) -> int:
    wanted = math.ceil(CACHES_FILLED * arch.l2_bytes / max(1, size_bytes)) + 1
    affordable = int(MEMORY_SHARE * arch.memory_bytes) // max(1, size_bytes)
    return max(1, min(wanted, affordable, MOST_COPIES))


def rotated(problem: AttentionProblem, count: int) -> list[AttentionProblem]:
    """`count` problems over one pool of pages: the same data once per problem, each page table naming its own."""
    pages, page_size = problem.k_cache.shape[:2]
    columns = torch.arange(problem.page_table.shape[1], device=problem.page_table.device)
    used = columns[None, :] * page_size < problem.kv_lens[:, None]
    k_cache, v_cache = _repeated(problem.k_cache, count), _repeated(problem.v_cache, count)
    return [
        dataclasses.replace(
            problem,
            k_cache=k_cache,
            v_cache=v_cache,
            page_table=torch.where(used, problem.page_table + turn * pages, problem.page_table),
        )
        for turn in range(count)
    ]


def _repeated(cache: torch.Tensor, count: int) -> torch.Tensor:
    """`count` times the pages of a cache, in such memory as the runtime's own cache has."""
    pages = huge_pages.advise(cache.new_empty(count * cache.shape[0], *cache.shape[1:]))
    pages.view(count, *cache.shape).copy_(cache.expand(count, *cache.shape))
    return pages


def _selection_calls(spec: KernelSpec, workload: Workload, arch: Arch, seed: int, device: str) -> tuple[Call, ...]:
    prefix = max(1, workload.kv_len - workload.q_len)
    scores = random_scores(workload.batch, spec.selection_heads, [prefix] * workload.batch, prefix, seed).to(device)
    prefix_lens = torch.full((workload.batch,), prefix, dtype=torch.int32, device=device)
    policy = TopK(k=max(1, workload.budget))
    return tuple(select_call(scores.clone(), prefix_lens, policy) for _ in range(copies(scores.nbytes, arch)))
