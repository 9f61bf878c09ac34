"""Time of the Triton selection kernel: one block walks one row, once per radix digit and once to write."""

from __future__ import annotations

import math

from specattn_codegen.arch import Arch
from specattn_codegen.build.resources import Resources
from specattn_codegen.cost_model.grid import Grid, Iteration, Launch
from specattn_codegen.cost_model.hardware import rates
from specattn_codegen.cost_model.occupancy import blocks_per_sm
from specattn_codegen.plan import Plan
from specattn_codegen.spec import KernelSpec, Workload

KEY_BITS = 32
SCORE_BYTES = 4
# Vector operations per score and pass: ordering its bits, the forced keys, comparing the digits above, and the share of
# the histogram's additions in shared memory.
SCORE_OPS = 20.0
# Operations per histogram bin and tile: clearing, adding and reading it back over the block.
BIN_OPS = 4.0


def selection_launch(spec: KernelSpec, workload: Workload, plan: Plan, arch: Arch, resources: Resources) -> Launch:
    prefix = max(1, workload.kv_len - workload.q_len)
    block_n, radix_bits = plan.integer("block_n"), plan.integer("radix_bits")
    blocks = workload.batch * spec.selection_heads
    speed = rates(arch, spec.dtype, active_sms=min(blocks, arch.num_sms), warp_groups=False)
    passes = KEY_BITS // radix_bits + 1
    scores = min(block_n, prefix)
    iteration = Iteration(
        memory_bytes=scores * SCORE_BYTES / passes,  # the first pass brings the row into the L2
        l2_bytes=scores * SCORE_BYTES * (1 - 1 / passes)
        + 2.0 * resources.spill_bytes * resources.num_warps * arch.warp_size,
        matrix_ops=0.0,
        vector_ops=SCORE_OPS * block_n + BIN_OPS * 2**radix_bits,
        chain=1.0,
        chain_latency_us=speed.l2_latency_us,
        in_flight=1.0,
    )
    grid = Grid(
        blocks=blocks,
        num_warps=resources.num_warps,
        resident=max(1, blocks_per_sm(resources, arch)),
        iterations=passes * math.ceil(prefix / block_n),
        setup_us=speed.memory_latency_us,
    )
    return Launch(name="select_rows", grid=grid, iteration=iteration, rates=speed)
