"""Time of one launch: identical blocks that repeat one iteration, over the multiprocessors of a GPU."""

from __future__ import annotations

import math
from dataclasses import dataclass

from specattn_codegen.cost_model.hardware import SCHEDULERS_PER_SM, SHARPNESS, STREAMING_SHARE, MultiprocessorRates
from specattn_codegen.cost_model.prediction import Residency, Term
from specattn_codegen.processors.arch import Arch


@dataclass(frozen=True, slots=True, kw_only=True)
class Iteration:
    """What one block does per iteration.

    memory_bytes, l2_bytes  moved from memory, and from the L2 where another block has brought it there
    matrix_ops, vector_ops  operations of the tensor cores and of the vector lanes
    chain                   dependent trips to memory before the iteration's data is there
    chain_latency_us        time of one trip
    in_flight               iterations whose loads are under way at once: 1 means each waits for its own
    """

    memory_bytes: float
    l2_bytes: float
    matrix_ops: float
    vector_ops: float
    chain: float
    chain_latency_us: float
    in_flight: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """blocks of num_warps warps, of which one multiprocessor holds `resident`; each repeats `iterations` times."""

    blocks: int
    num_warps: int
    resident: int
    iterations: int
    setup_us: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """One kernel of a call: its grid, what a block repeats, and what one multiprocessor does meanwhile.

    within  whether it is the end of the launch before, and none of its own
    """

    name: str
    grid: Grid
    iteration: Iteration
    rates: MultiprocessorRates
    within: bool = False

    def term(self, num_sms: int) -> Term:
        return grid_term(self.name, self.grid, self.iteration, num_sms, self.rates)


def wave_us(iteration: Iteration, resident: int, num_warps: int, rates: MultiprocessorRates) -> tuple[float, str]:
    """One iteration of `resident` blocks that share a multiprocessor, and what limits it.

    By Little's law a block that waits for its own loads moves its bytes once per latency, whatever the bandwidth is
    (Volkov, Understanding Latency Hiding on GPUs, 2016, chapter 4); more blocks, or more iterations in flight, fill
    the wait until one of the shared units is full. Limits that come close to each other add up in part.
    """
    matrix, vector = iteration.matrix_ops / rates.matrix_ops, iteration.vector_ops / rates.vector_ops
    alone = (matrix + vector) * max(1.0, SCHEDULERS_PER_SM / num_warps) + rates.iteration_us
    waiting = iteration.chain * iteration.chain_latency_us
    own = waiting + alone if iteration.in_flight <= 1 else max(waiting / iteration.in_flight, alone)
    limits = {
        "latency": own,
        "memory": resident * iteration.memory_bytes / rates.memory_bytes,
        "l2": resident * (iteration.memory_bytes + iteration.l2_bytes) / rates.l2_bytes,
        "matrix": resident * matrix,
        "vector": resident * vector,
    }
    limit = max(limits, key=lambda name: limits[name])
    return sum(value**SHARPNESS for value in limits.values()) ** (1 / SHARPNESS), limit


def grid_term(name: str, grid: Grid, iteration: Iteration, num_sms: int, rates: MultiprocessorRates) -> Term:
    """Full waves, then the last one with what is left: its multiprocessors hold fewer blocks, and wait as long."""
    per_wave = grid.resident * num_sms
    full, rest = divmod(grid.blocks, per_wave)
    total, limit = 0.0, "latency"
    for waves, resident in ((full, grid.resident), (1 if rest else 0, math.ceil(rest / num_sms))):
        if waves:
            step, limit = wave_us(iteration, resident, grid.num_warps, rates)
            total += waves * (grid.setup_us + grid.iterations * step)
    if full:
        limit = wave_us(iteration, grid.resident, grid.num_warps, rates)[1]
    return Term(name=name, microseconds=total, limit=limit)


def residency(launch: Launch, arch: Arch) -> Residency:
    """Of a launch's first wave, where every block has all of its loads under way."""
    grid, iteration = launch.grid, launch.iteration
    blocks = min(grid.blocks, grid.resident * arch.num_sms)
    blocks_per_sm = math.ceil(blocks / arch.num_sms)
    warps = blocks_per_sm * grid.num_warps
    return Residency(
        blocks_per_sm=blocks_per_sm,
        warps_per_sm=warps,
        occupancy=warps * arch.warp_size / arch.max_threads_per_sm,
        bytes_in_flight=blocks * iteration.memory_bytes * max(1.0, iteration.in_flight),
        bytes_to_saturate=launch.rates.memory_latency_us * STREAMING_SHARE * arch.bandwidth_gbs * 1e3,
    )
