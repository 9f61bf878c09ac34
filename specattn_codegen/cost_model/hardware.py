"""Constants of GPUs that no data sheet row holds, each with its source, and what one multiprocessor does per second."""

from __future__ import annotations

from dataclasses import dataclass

from specattn_codegen.processors.arch import Arch
from specattn_codegen.spec import Dtype

# Latencies and the L2's bandwidth relative to memory: hardware features of V100, A100 and H100, table 3 of
# doi:10.1016/j.ultsonch.2023.106546 (400 and 200 cycles; 7219 / 1555 GB/s on A100, 8986 / 3352 GB/s on H100). The
# smaller ratio is taken for every GPU.
MEMORY_LATENCY_CYCLES = 400.0
L2_LATENCY_CYCLES = 200.0
L2_TO_MEMORY = 2.7

# Ours, not measured: queueing about doubles the latency of a memory system near its peak, streams reach nine tenths of
# the data sheet, and a kernel that follows another starts this much later.
LOADED_LATENCY = 2.0
STREAMING_SHARE = 0.9
LAUNCH_US = 2.0

# Ours, not measured. One iteration's own chain besides memory: product, reductions over a row, exponentials, product,
# and the barriers between them. And how sharply limits take turns: 1 adds them up, infinity overlaps them.
ITERATION_CYCLES = 300.0
SHARPNESS = 4.0

# Results per clock and multiprocessor, CUDA C++ Programming Guide, table "Throughput of Native Arithmetic
# Instructions": 128 float32 operations (capability 8.6 and later) to 16 base-2 exponentials.
EXP2_OPS = 8.0

# Hopper's warp-level mma reaches 62.9 % of the tensor cores' peak; only the warp-group form, for tiles of at least 64
# rows and four warps, reaches all of it (arXiv 2402.13499, section on tensor cores).
WARP_MMA_SHARE = 0.63
WARP_GROUP_ROWS = 64
WARP_GROUP_WARPS = 4
SCHEDULERS_PER_SM = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class MultiprocessorRates:
    """What one multiprocessor does per microsecond: bytes of memory and L2, matrix operations, vector lanes."""

    memory_bytes: float
    l2_bytes: float
    matrix_ops: float
    vector_ops: float
    memory_latency_us: float
    l2_latency_us: float
    iteration_us: float


def rates(arch: Arch, dtype: Dtype, *, active_sms: int, warp_groups: bool) -> MultiprocessorRates:
    """Rates of one of `active_sms` busy multiprocessors, which share the memory among them.

    A multiprocessor on its own draws no more than its share of the L2's bandwidth. Float32 matrix products stay
    exact, so they run on the vector lanes.
    """
    memory = STREAMING_SHARE * arch.bandwidth_gbs * 1e3  # bytes per microsecond
    port = L2_TO_MEMORY * memory / arch.num_sms
    has_warp_groups = arch.vendor == "nvidia" and 90 <= arch.compute_capability < 120
    share = WARP_MMA_SHARE if has_warp_groups and not warp_groups else 1.0
    tflops = arch.fp32_tflops if dtype == "float32" else arch.bf16_tflops * share
    cycle_us = 1e-3 / arch.clock_ghz
    return MultiprocessorRates(
        memory_bytes=min(memory / active_sms, port),
        l2_bytes=port,
        matrix_ops=tflops * 1e6 / arch.num_sms,
        vector_ops=arch.fp32_tflops * 1e6 / 2 / arch.num_sms,
        memory_latency_us=MEMORY_LATENCY_CYCLES * LOADED_LATENCY * cycle_us,
        l2_latency_us=L2_LATENCY_CYCLES * LOADED_LATENCY * cycle_us,
        iteration_us=ITERATION_CYCLES * cycle_us,
    )
