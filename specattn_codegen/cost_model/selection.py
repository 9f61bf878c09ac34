"""Time of the Triton selection kernel by number of keys: passes over a row for its digits, a count, and the writing."""

from __future__ import annotations

import math

from specattn_codegen.build.resources import Resources
from specattn_codegen.cost_model.grid import Grid, Iteration, Launch
from specattn_codegen.cost_model.hardware import rates
from specattn_codegen.cost_model.occupancy import blocks_per_sm
from specattn_codegen.plan import Plan
from specattn_codegen.processors.arch import Arch
from specattn_codegen.spec import KernelSpec, Workload

KEY_BITS = 32
SCORE_BYTES = 4
# Vector operations per score and pass: ordering its bits, the forced keys, comparing the digits above, and the share of
# the histogram's additions in shared memory.
SCORE_OPS = 20.0
# Operations per histogram bin and tile: clearing, adding and reading it back over the block.
BIN_OPS = 4.0


FEWEST_SPLITS = 4  # as in the template: fewer blocks to a row gain less than their launches cost


def num_splits(spec: KernelSpec, plan: Plan, workload: Workload, arch: Arch) -> int:
    """Blocks that share a row, as the rendered kernel counts them."""
    rows, prefix = workload.batch * spec.selection_heads, max(1, workload.kv_len - workload.q_len)
    tiles = math.ceil(prefix / plan.integer("block_n"))
    splits = min(plan.integer("max_splits"), arch.num_sms // rows, tiles)
    return splits if splits >= FEWEST_SPLITS else 1


def selection_launches(
    spec: KernelSpec, workload: Workload, plan: Plan, arch: Arch, resources: Resources
) -> tuple[Launch, ...]:
    """One launch for all passes where a row has one block, on NVIDIA; else a launch for each pass."""
    prefix = max(1, workload.kv_len - workload.q_len)
    block_n, radix_bits = plan.integer("block_n"), plan.integer("radix_bits")
    splits = num_splits(spec, plan, workload, arch)
    blocks = workload.batch * spec.selection_heads * splits
    speed = rates(arch, spec.dtype, active_sms=min(blocks, arch.num_sms), warp_groups=False)
    passes = math.ceil(KEY_BITS / radix_bits) + 2
    launches = 1 if splits == 1 and arch.vendor == "nvidia" else passes
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
        iterations=passes // launches * math.ceil(math.ceil(prefix / splits) / block_n),
        setup_us=speed.memory_latency_us,
    )
    return (Launch(name="select_rows", grid=grid, iteration=iteration, rates=speed),) * launches
