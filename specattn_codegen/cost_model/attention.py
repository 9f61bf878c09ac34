"""Time of the Triton attention kernels: attend_splits, merge_splits and score_keys, as their templates launch them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator

from specattn_codegen.build.resources import Resources
from specattn_codegen.cost_model.floor import keys_read
from specattn_codegen.cost_model.grid import Grid, Iteration, Launch
from specattn_codegen.cost_model.hardware import (
    EXP2_OPS,
    WARP_GROUP_ROWS,
    WARP_GROUP_WARPS,
    MultiprocessorRates,
    rates,
)
from specattn_codegen.cost_model.occupancy import blocks_per_sm
from specattn_codegen.plan import Plan
from specattn_codegen.processors.arch import Arch
from specattn_codegen.space.triton import converted_bytes, merges_last, padded
from specattn_codegen.spec import KernelSpec, ScoreSpec, Workload

# Vector operations per logit besides the exponential: scale, mask, running maximum, difference, sum and conversion.
LOGIT_OPS = 8.0
# Per logit of a column sum: a multiplication and its share of the additions across rows.
COLUMN_OPS = 3.0
# Address arithmetic per 16 bytes gathered through a page table.
ADDRESS_OPS = 6.0
# Per 8-bit float that is converted, as counted in the loops of binaries for a100 and h100.
FLOAT8_OPS = {("float8_e4m3", "native"): 4.0, ("float8_e5m2", "native"): 5.0}
FLOAT8_OPS |= {("float8_e4m3", "bits"): 8.0, ("float8_e5m2", "bits"): 5.0}
PARTIALS_MERGED_AT_ONCE = 8  # of so many rows:
ROWS_MERGED_AT_ONCE = 4
FLOAT_BYTES = 4
SECTOR_BYTES = 32  # of the L2; what one atomic addition costs it

# What a launch's time depends on of a plan, besides what its binary takes: plans that agree in these share the launch.
_SPLITS = ("block_m", "block_n", "num_warps", "ctas_per_sm", "split_keys")
_ATTEND = (*_SPLITS, "kv_load", "float8", "score_method")
_MERGE = (*_SPLITS, "merge")
_SCORE = ("block_m", "num_warps", "float8", "score_method", "score_block_n")

Likeness = tuple[object, ...]


def num_splits(spec: KernelSpec, plan: Plan, workload: Workload, arch: Arch) -> int:
    """Splits of every request's keys, by the rule of the templates' own num_splits."""
    split_keys = plan.integer("split_keys")
    if split_keys:
        spare = spec.op == "sparse_attention"
        return max(1, math.ceil(workload.kv_len / split_keys) + spare)
    blocks = row_tiles(spec, plan, workload) * spec.heads.num_kv_heads * workload.batch
    wanted = plan.integer("ctas_per_sm") * arch.num_sms // max(1, blocks)
    return max(1, min(wanted, math.ceil(workload.kv_len / plan.integer("block_n"))))


def row_tiles(spec: KernelSpec, plan: Plan, workload: Workload) -> int:
    return math.ceil(workload.q_len * spec.heads.group / plan.integer("block_m"))


def used_splits(spec: KernelSpec, plan: Plan, workload: Workload, arch: Arch) -> tuple[int, int]:
    """Splits that hold keys, and tiles of one: the keys are dealt in whole tiles."""
    block_n, split_keys = plan.integer("block_n"), plan.integer("split_keys")
    tiles = math.ceil(keys_read(spec, workload) / block_n)
    per_split = split_keys // block_n or math.ceil(tiles / num_splits(spec, plan, workload, arch))
    return math.ceil(tiles / per_split), min(tiles, per_split)


def scored_rows(score: ScoreSpec, workload: Workload) -> int:
    return {"all": workload.q_len, "ends": min(2, workload.q_len), "last": 1}[score.rows]


def scores_directly(spec: KernelSpec, plan: Plan, workload: Workload) -> bool:
    """Whether attend_splits writes the scores itself: one tile of rows sees all that a score is made of."""
    score = spec.score
    return (
        score is not None
        and plan["score_method"] == "fused"
        and not (score.heads == "layer" or score.by_page or score.histogram or spec.heads.window is not None)
        and row_tiles(spec, plan, workload) == 1
    )


def attention_launches(
    spec: KernelSpec, workload: Workload, plan: Plan, arch: Arch, resources: tuple[Resources, ...]
) -> tuple[Launch, ...]:
    """The kernels of one call, in order."""
    return tuple(make() for _, make in launch_makers(spec, workload, plan, arch, resources))


def launch_makers(
    spec: KernelSpec, workload: Workload, plan: Plan, arch: Arch, resources: tuple[Resources, ...]
) -> Iterator[tuple[Likeness, Callable[[], Launch]]]:
    """The kernels of one call, in order, each with what makes it like that of another plan: launches of one kernel,
    workload and processor whose likeness is equal are equal."""
    settings, by_name = plan.as_dict(), {kernel.kernel: kernel for kernel in resources}

    def maker(
        launch: Callable[..., Launch], names: tuple[str, ...], kernel: str
    ) -> tuple[Likeness, Callable[[], Launch]]:
        likeness = (kernel, by_name[kernel], *map(settings.get, names))
        return likeness, functools.partial(launch, spec, workload, plan, arch, by_name[kernel])

    yield maker(_attend, _ATTEND, "attend_splits")
    yield maker(_merge, _MERGE, "attend_splits" if merges_last(plan) else "merge_splits")
    if spec.score is not None and not scores_directly(spec, plan, workload):
        yield maker(functools.partial(_score, spec.score), _SCORE, "score_keys")


def _shared_rates(spec: KernelSpec, plan: Plan, arch: Arch, blocks: int) -> MultiprocessorRates:
    warp_groups = plan.integer("block_m") >= WARP_GROUP_ROWS and plan.integer("num_warps") >= WARP_GROUP_WARPS
    return rates(arch, spec.dtype, active_sms=min(blocks, arch.num_sms), warp_groups=warp_groups)


def _conversion_ops(spec: KernelSpec, plan: Plan) -> float:
    """Vector operations per element of the cache."""
    return FLOAT8_OPS[spec.cache_dtype, str(plan["float8"])] if spec.is_float8 else 0.0


def _address_ops(plan: Plan) -> float:
    return 0.0 if plan.get("kv_load") == "descriptor" else ADDRESS_OPS


def _attend(spec: KernelSpec, workload: Workload, plan: Plan, arch: Arch, resources: Resources) -> Launch:
    heads, tiles_of_rows = spec.heads, row_tiles(spec, plan, workload)
    block_m, block_n = plan.integer("block_m"), plan.integer("block_n")
    dims = padded(heads.head_dim) + padded(heads.v_head_dim)
    splits, iterations = used_splits(spec, plan, workload, arch)
    blocks = tiles_of_rows * heads.num_kv_heads * workload.batch * splits
    speed = _shared_rates(spec, plan, arch, blocks)

    tile_bytes = block_n * (heads.head_dim + heads.v_head_dim) * spec.cache_bytes
    logits = block_m * block_n
    fused = spec.score is not None and plan["score_method"] == "fused"
    spilled = 2.0 * resources.spill_bytes * resources.num_warps * arch.warp_size
    iteration = Iteration(
        # Tiles of rows over the same keys run side by side, so that all but one find them in the L2.
        memory_bytes=tile_bytes / tiles_of_rows + _kept_bytes(spec, plan, workload),
        l2_bytes=tile_bytes * (1 - 1 / tiles_of_rows) + spilled,
        matrix_ops=2.0 * logits * dims,
        vector_ops=logits * (LOGIT_OPS + EXP2_OPS + COLUMN_OPS * fused)
        + block_m * padded(heads.v_head_dim)
        + block_n * dims * _conversion_ops(spec, plan)
        + _address_ops(plan) * tile_bytes / 16,
        chain=2.0,  # the page (or the selected key), then what lies there
        chain_latency_us=speed.memory_latency_us,
        in_flight=_tiles_in_flight(resources, spec, plan, arch),
    )
    grid = Grid(
        blocks=blocks,
        num_warps=resources.num_warps,
        resident=max(1, blocks_per_sm(resources, arch)),
        iterations=iterations,
        setup_us=3 * speed.memory_latency_us,  # lengths, queries, and the partial result on its way out
    )
    return Launch(name="attend_splits", grid=grid, iteration=iteration, rates=speed)


def _tiles_in_flight(resources: Resources, spec: KernelSpec, plan: Plan, arch: Arch) -> float:
    """K and V tiles the binary keeps in shared memory besides the one in use; num_stages is only a wish."""
    dim, v_dim = padded(spec.heads.head_dim), padded(spec.heads.v_head_dim)
    others = plan.integer("block_m") * dim * spec.dtype_bytes + converted_bytes(plan, spec, arch)
    tile = plan.integer("block_n") * (dim + v_dim) * spec.cache_bytes
    return max(1.0, (resources.smem_bytes - others) / tile)


def _kept_bytes(spec: KernelSpec, plan: Plan, workload: Workload) -> float:
    """Bytes one block keeps for score_keys per iteration: weights of the scored rows, or one sum of them per key."""
    if spec.score is None or plan["score_method"] == "remat":
        return 0.0
    if plan["score_method"] == "fused":
        return plan.integer("block_n") * FLOAT_BYTES
    rows = scored_rows(spec.score, workload) * spec.heads.group / row_tiles(spec, plan, workload)
    return rows * plan.integer("block_n") * weight_bytes(spec)


def weight_bytes(spec: KernelSpec) -> int:
    """Of a weight that is kept."""
    return FLOAT_BYTES if spec.dtype == "float32" else 2


def _merge(spec: KernelSpec, workload: Workload, plan: Plan, arch: Arch, resources: Resources) -> Launch:
    """Blocks walk partial results that attend_splits has just left in the L2: a block of its own for every few rows of
    a KV head, or the last block of every tile, which walks all of the tile's rows."""
    last = merges_last(plan)
    splits, _ = used_splits(spec, plan, workload, arch)
    tiles = (
        row_tiles(spec, plan, workload) if last else math.ceil(workload.q_len * spec.heads.group / ROWS_MERGED_AT_ONCE)
    )
    blocks = tiles * spec.heads.num_kv_heads * workload.batch
    speed = _shared_rates(spec, plan, arch, blocks)
    rows = workload.q_len * spec.heads.group / tiles
    steps = math.ceil(rows / ROWS_MERGED_AT_ONCE)
    merged = min(splits, PARTIALS_MERGED_AT_ONCE) * rows / steps
    iteration = Iteration(
        memory_bytes=0.0,
        l2_bytes=merged * (spec.heads.v_head_dim + 1) * FLOAT_BYTES,
        matrix_ops=0.0,
        vector_ops=2.0 * PARTIALS_MERGED_AT_ONCE * ROWS_MERGED_AT_ONCE * padded(spec.heads.v_head_dim),
        chain=1.0,
        chain_latency_us=speed.l2_latency_us,
        in_flight=1.0,
    )
    grid = Grid(
        blocks=blocks,
        num_warps=resources.num_warps,
        resident=max(1, blocks_per_sm(resources, arch)),
        iterations=steps * math.ceil(splits / PARTIALS_MERGED_AT_ONCE),
        # Lengths; or the counter there and back, once what it counts has arrived.
        setup_us=(2 if last else 3) * speed.l2_latency_us,
    )
    return Launch(name="merge" if last else "merge_splits", grid=grid, iteration=iteration, rates=speed, within=last)


def _score(
    score: ScoreSpec, spec: KernelSpec, workload: Workload, plan: Plan, arch: Arch, resources: Resources
) -> Launch:
    """A block makes one tile of scores, or one page that is larger than a tile."""
    keys = plan.integer("score_block_n")
    in_parts = score.by_page and spec.page_size > keys
    keys_of_block = math.ceil(spec.page_size / keys) * keys if in_parts else keys
    prefix = workload.kv_len - workload.q_len
    blocks = max(1, math.ceil(prefix / keys_of_block)) * spec.selection_heads * workload.batch
    speed = _shared_rates(spec, plan, arch, blocks)
    iteration, iterations = _score_iteration(spec, score, workload, plan, speed)
    grid = Grid(
        blocks=blocks,
        num_warps=resources.num_warps,
        resident=max(1, blocks_per_sm(resources, arch)),
        iterations=iterations * keys_of_block // keys,
        setup_us=3 * speed.memory_latency_us,
    )
    return Launch(name="score_keys", grid=grid, iteration=iteration, rates=speed)


def _score_iteration(
    spec: KernelSpec, score: ScoreSpec, workload: Workload, plan: Plan, speed: MultiprocessorRates
) -> tuple[Iteration, int]:
    """What is repeated and how often: a KV head of remat and dump, a tile of shares of fused."""
    heads, keys = spec.heads, plan.integer("score_block_n")
    kv_heads = heads.num_kv_heads if score.heads == "layer" else 1
    rows = scored_rows(score, workload) * heads.group
    logits = padded(rows) * keys
    counted = keys * SECTOR_BYTES if score.histogram else 0
    memory_bytes, l2_bytes, matrix_ops, vector_ops = 0.0, float(counted), 0.0, 0.0
    if plan["score_method"] == "remat":
        memory_bytes = keys * heads.head_dim * spec.cache_bytes
        l2_bytes += rows * heads.head_dim * spec.dtype_bytes
        matrix_ops = 2.0 * logits * padded(heads.head_dim)
        vector_ops = logits * (LOGIT_OPS + EXP2_OPS) + keys * padded(heads.head_dim) * _conversion_ops(spec, plan)
    elif plan["score_method"] == "dump":
        memory_bytes = rows * keys * weight_bytes(spec)
        vector_ops = logits * (LOGIT_OPS + EXP2_OPS)
    else:
        memory_bytes = keys * FLOAT_BYTES
        vector_ops = float(keys)
        kv_heads *= row_tiles(spec, plan, workload)
    iteration = Iteration(
        memory_bytes=memory_bytes,
        l2_bytes=l2_bytes,
        matrix_ops=matrix_ops,
        vector_ops=vector_ops,
        chain=1.0,
        chain_latency_us=speed.memory_latency_us,
        in_flight=1.0,
    )
    return iteration, kv_heads
