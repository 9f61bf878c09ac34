"""Time of the Triton attention kernels: attend_splits, merge_splits and score_keys, as their templates launch them."""

from __future__ import annotations

import math

from specattn_codegen.arch import Arch
from specattn_codegen.build.resources import Resources
from specattn_codegen.cost_model.floor import keys_read
from specattn_codegen.cost_model.grid import Grid, Iteration, grid_term
from specattn_codegen.cost_model.hardware import (
    EXP2_OPS,
    WARP_GROUP_ROWS,
    WARP_GROUP_WARPS,
    MultiprocessorRates,
    rates,
)
from specattn_codegen.cost_model.occupancy import blocks_per_sm
from specattn_codegen.cost_model.prediction import Term
from specattn_codegen.plan import Plan
from specattn_codegen.space.triton import padded
from specattn_codegen.spec import KernelSpec, Workload

# Vector operations per logit besides the exponential: scale, mask, running maximum, difference, sum and conversion.
LOGIT_OPS = 8.0
# Address arithmetic per 16 bytes gathered through a page table.
ADDRESS_OPS = 6.0
PARTIALS_MERGED_AT_ONCE = 16
FLOAT_BYTES = 4


def num_splits(spec: KernelSpec, plan: Plan, workload: Workload, arch: Arch) -> int:
    """Splits of every request's keys, by the rule of the templates' own num_splits."""
    blocks = row_tiles(spec, plan, workload) * spec.heads.num_kv_heads * workload.batch
    wanted = plan.integer("ctas_per_sm") * arch.num_sms // max(1, blocks)
    return max(1, min(wanted, math.ceil(workload.kv_len / plan.integer("block_n"))))


def row_tiles(spec: KernelSpec, plan: Plan, workload: Workload) -> int:
    return math.ceil(workload.q_len * spec.heads.group / plan.integer("block_m"))


def attention_terms(
    spec: KernelSpec, workload: Workload, plan: Plan, arch: Arch, resources: tuple[Resources, ...]
) -> tuple[Term, ...]:
    """One term per launch, in order."""
    by_name = {kernel.kernel: kernel for kernel in resources}
    terms = [
        _attend(spec, workload, plan, arch, by_name["attend_splits"]),
        _merge(spec, workload, plan, arch, by_name["merge_splits"]),
    ]
    if spec.score is not None:
        terms.append(_score(spec, workload, plan, arch, by_name["score_keys"]))
    return tuple(terms)


def _used_splits(spec: KernelSpec, plan: Plan, workload: Workload, arch: Arch) -> tuple[int, int]:
    """Splits that hold keys, and tiles of one: the keys are dealt in whole tiles."""
    tiles = math.ceil(keys_read(spec, workload) / plan.integer("block_n"))
    per_split = math.ceil(tiles / num_splits(spec, plan, workload, arch))
    return math.ceil(tiles / per_split), per_split


def _shared_rates(spec: KernelSpec, plan: Plan, arch: Arch, blocks: int) -> MultiprocessorRates:
    warp_groups = plan.integer("block_m") >= WARP_GROUP_ROWS and plan.integer("num_warps") >= WARP_GROUP_WARPS
    return rates(arch, spec.dtype, active_sms=min(blocks, arch.num_sms), warp_groups=warp_groups)


def _attend(spec: KernelSpec, workload: Workload, plan: Plan, arch: Arch, resources: Resources) -> Term:
    heads, tiles_of_rows = spec.heads, row_tiles(spec, plan, workload)
    block_m, block_n = plan.integer("block_m"), plan.integer("block_n")
    dims = padded(heads.head_dim) + padded(heads.v_head_dim)
    splits, iterations = _used_splits(spec, plan, workload, arch)
    blocks = tiles_of_rows * heads.num_kv_heads * workload.batch * splits
    speed = _shared_rates(spec, plan, arch, blocks)

    tile_bytes = block_n * (heads.head_dim + heads.v_head_dim) * spec.dtype_bytes
    logits = block_m * block_n
    dumped = _dumped_bytes(spec, plan, workload) if spec.score else 0.0
    spilled = 2.0 * resources.spill_bytes * resources.num_warps * arch.warp_size
    iteration = Iteration(
        # Tiles of rows over the same keys run side by side, so that all but one find them in the L2.
        memory_bytes=tile_bytes / tiles_of_rows + dumped,
        l2_bytes=tile_bytes * (1 - 1 / tiles_of_rows) + spilled,
        matrix_ops=2.0 * logits * dims,
        vector_ops=logits * (LOGIT_OPS + EXP2_OPS) + block_m * padded(heads.v_head_dim) + ADDRESS_OPS * tile_bytes / 16,
        chain=2.0,  # the page (or the selected key), then what lies there
        chain_latency_us=speed.memory_latency_us,
        in_flight=_tiles_in_flight(resources, spec, plan),
    )
    grid = Grid(
        blocks=blocks,
        num_warps=resources.num_warps,
        resident=max(1, blocks_per_sm(resources, arch)),
        iterations=iterations,
        setup_us=3 * speed.memory_latency_us,  # lengths, queries, and the partial result on its way out
    )
    return grid_term("attend_splits", grid, iteration, arch.num_sms, speed)


def _tiles_in_flight(resources: Resources, spec: KernelSpec, plan: Plan) -> float:
    """K and V tiles the binary keeps in shared memory besides the one in use; num_stages is only a wish."""
    dim, v_dim = padded(spec.heads.head_dim), padded(spec.heads.v_head_dim)
    queries = plan.integer("block_m") * dim * spec.dtype_bytes
    tile = plan.integer("block_n") * (dim + v_dim) * spec.dtype_bytes
    return max(1.0, (resources.smem_bytes - queries) / tile)


def _dumped_bytes(spec: KernelSpec, plan: Plan, workload: Workload) -> float:
    """Bytes of weights one block keeps per iteration."""
    if plan["score_method"] != "dump" or spec.score is None:
        return 0.0
    rows = {"all": workload.q_len, "ends": min(2, workload.q_len), "last": 1}[spec.score.rows]
    weight_bytes = FLOAT_BYTES if spec.dtype == "float32" else 2
    return rows * spec.heads.group * plan.integer("block_n") * weight_bytes / row_tiles(spec, plan, workload)


def _merge(spec: KernelSpec, workload: Workload, plan: Plan, arch: Arch, resources: Resources) -> Term:
    """A block per row and head walks its partial results, which attend_splits has just left in the L2."""
    splits, _ = _used_splits(spec, plan, workload, arch)
    blocks = workload.q_len * spec.heads.num_q_heads * workload.batch
    speed = _shared_rates(spec, plan, arch, blocks)
    merged = min(splits, PARTIALS_MERGED_AT_ONCE)
    iteration = Iteration(
        memory_bytes=0.0,
        l2_bytes=merged * (spec.heads.v_head_dim + 1) * FLOAT_BYTES,
        matrix_ops=0.0,
        vector_ops=2.0 * PARTIALS_MERGED_AT_ONCE * padded(spec.heads.v_head_dim),
        chain=1.0,
        chain_latency_us=speed.l2_latency_us,
        in_flight=1.0,
    )
    grid = Grid(
        blocks=blocks,
        num_warps=resources.num_warps,
        resident=max(1, blocks_per_sm(resources, arch)),
        iterations=math.ceil(splits / PARTIALS_MERGED_AT_ONCE),
        setup_us=3 * speed.l2_latency_us,
    )
    return grid_term("merge_splits", grid, iteration, arch.num_sms, speed)


def _score(spec: KernelSpec, workload: Workload, plan: Plan, arch: Arch, resources: Resources) -> Term:
    """remat reads the keys and multiplies again; dump reads the kept weights. A block makes one tile of scores."""
    if spec.score is None:
        raise TypeError("a kernel without scores has no score_keys")
    heads, layer = spec.heads, spec.score.heads == "layer"
    keys = plan.integer("score_block_n")
    blocks = math.ceil((workload.kv_len - workload.q_len) / keys) * spec.selection_heads * workload.batch
    blocks = max(1, blocks)
    speed = _shared_rates(spec, plan, arch, blocks)
    rows = {"all": workload.q_len, "ends": min(2, workload.q_len), "last": 1}[spec.score.rows] * heads.group
    kv_heads = heads.num_kv_heads if layer else 1
    logits = padded(rows) * keys
    if plan["score_method"] == "remat":
        iteration = Iteration(
            memory_bytes=keys * heads.head_dim * spec.dtype_bytes,
            l2_bytes=rows * heads.head_dim * spec.dtype_bytes,
            matrix_ops=2.0 * logits * padded(heads.head_dim),
            vector_ops=logits * (LOGIT_OPS + EXP2_OPS),
            chain=1.0,
            chain_latency_us=speed.memory_latency_us,
            in_flight=1.0,
        )
    else:
        iteration = Iteration(
            memory_bytes=rows * keys * (FLOAT_BYTES if spec.dtype == "float32" else 2),
            l2_bytes=0.0,
            matrix_ops=0.0,
            vector_ops=logits * (LOGIT_OPS + EXP2_OPS),
            chain=1.0,
            chain_latency_us=speed.memory_latency_us,
            in_flight=1.0,
        )
    grid = Grid(
        blocks=blocks,
        num_warps=resources.num_warps,
        resident=max(1, blocks_per_sm(resources, arch)),
        iterations=kv_heads,
        setup_us=3 * speed.memory_latency_us,
    )
    return grid_term("score_keys", grid, iteration, arch.num_sms, speed)
