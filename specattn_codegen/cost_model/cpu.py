"""Time of the CPU's attention kernels: tasks of whole tiles, dealt to the cores, then the merge. It ranks plans.

A tile is read and multiplied; what its rows keep between tiles is rescaled once a tile; larger tiles do that less often
and leave the caches sooner. Few rows of all heads go over a tile in strips of keys, in the order of memory, and have
their results at hand for every strip. Tasks are few and long or many and short; the last ones leave cores idle.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass

from specattn_codegen.cost_model.attention import scored_rows
from specattn_codegen.cost_model.floor import keys_read
from specattn_codegen.cost_model.prediction import Residency, Term
from specattn_codegen.plan import Plan
from specattn_codegen.processors.arch import Arch
from specattn_codegen.space.cpu import LANES
from specattn_codegen.spec import DTYPE_BYTES, KernelSpec, Workload

FLOAT_BYTES = 4
MEMORY_LATENCY_US = 0.1
USUAL_BANDWIDTH_GBS, USUAL_CORE_TFLOPS = 20.0, 0.15  # where nobody has measured the processor's
NEAR_BYTES = 32 << 10  # as in the template: of the rows' running results, beyond which nothing goes in strips
STRIP_KEYS = 8
DIRECT_ROWS = 4  # that product=bf16 multiplies with keys as they lie, as it must in strips
DENSE_LIMIT = 512  # tasks beyond which they are taken to be dealt evenly


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuConstants:
    """What no data sheet row holds, fitted to the sweeps of benchmarks/results/cpu-amd-epyc: a prediction is typically
    4 to 13 % off, and the first choice within 3 % of the best plan.

    fma_share, bf16_share  of the multiply-add rates that the engines reach on full blocks of rows
    softmax_ops            vector operations per logit
    rescale_bytes_ns       per byte of the running results, which every tile rescales
    near_bytes_ns          the same, for every strip of keys
    key_ns                 per key and head of a tile: its rows' addresses
    locate_ns              per key of a tile, once for all heads of a task: its page, its place, its mask
    tile_ns                per tile and head
    transpose_ns           per byte of keys that the bfloat16 engine turns around
    run_bytes              a scattered read costs as much as this many more bytes
    task_us                to start a task
    overlap                share of the shorter of reading and computing that a prefetch hides
    far_bytes, near_bytes  of what a prefetch has under way: where half of it is lost from the second and first level
    cache_bytes            of a tile and its logits, above which they leave the second-level cache
    spill_cost             of a tile that does
    dump_ns, merge_ns      per byte of kept weights, and of partial results
    """

    fma_share: float = 1.0
    bf16_share: float = 1.0
    softmax_ops: float = 8.0
    rescale_bytes_ns: float = 0.0296
    near_bytes_ns: float = 0.0016
    key_ns: float = 24.0
    locate_ns: float = 24.0
    tile_ns: float = 5.0
    transpose_ns: float = 0.0043
    run_bytes: float = 207.0
    task_us: float = 0.1
    overlap: float = 1.0
    far_bytes: float = 1100000.0
    near_bytes: float = 92000.0
    cache_bytes: float = 234000.0
    spill_cost: float = 0.144
    dump_ns: float = 0.0155
    merge_ns: float = 0.507


USUAL = CpuConstants()


def strip_keys(rows: int, target: str) -> int:
    """Keys of a strip: a block of r rows is multiplied with LANES / r keys at once."""
    lanes = LANES[target]
    return max(STRIP_KEYS, lanes if rows & 1 else lanes // 2 if rows & 2 else lanes // 4)


def attention_terms(
    spec: KernelSpec, workload: Workload, plan: Plan, arch: Arch, constants: CpuConstants = USUAL
) -> tuple[Term, ...]:
    """What one call takes, by what cores do: tasks, by what limits a tile; waiting for the last one; the merge."""
    c, heads, settings = constants, spec.heads, plan.as_dict()
    rows = workload.q_len * heads.group
    keys = keys_read(spec, workload)
    tile, split = plan.integer("key_tile"), plan.integer("split_keys")
    task_heads = heads.num_kv_heads if plan["heads_per_task"] == "all" else 1
    dims = heads.head_dim + heads.v_head_dim
    cores = arch.num_sms
    bandwidth = (arch.bandwidth_gbs or USUAL_BANDWIDTH_GBS) * 1e3 / cores  # bytes per microsecond of one core
    is_fma = plan["product"] == "fma"
    flops = (arch.fp32_tflops if is_fma else arch.bf16_tflops) or USUAL_CORE_TFLOPS * cores
    rate = flops * 1e6 / cores * (c.fma_share if is_fma else c.bf16_share)
    vector = (arch.fp32_tflops or USUAL_CORE_TFLOPS * cores) * 1e6 / cores / 2

    # One tile of one head.
    run = task_heads * heads.head_dim * spec.cache_bytes
    tile_bytes = tile * dims * spec.cache_bytes
    # Scores that are made again from K read it twice, and multiply the scored rows by it twice.
    again = heads.head_dim / dims if settings.get("score_method") == "remat" else 0.0
    twice = scored_rows(spec.score, workload) / workload.q_len if spec.score is not None else 0.0
    memory = (1 + again) * tile_bytes * (1 + c.run_bytes / run) / bandwidth
    direct = is_fma or (plan["product"] == "bf16" and rows <= DIRECT_ROWS)
    block = 4 if direct else 8
    blocks = rows // block + bin(rows % block).count("1")
    products = (1 + again * twice) * 2.0 * tile * dims * (rows + 0.5 * (blocks * block - rows)) / rate
    results = rows * heads.v_head_dim * FLOAT_BYTES
    scratch = rows * tile * FLOAT_BYTES + results + tile_bytes
    strip = strip_keys(rows, arch.target)
    in_strips = direct and task_heads > 1 and task_heads * results <= NEAR_BYTES and strip < tile
    rescale_ns = c.near_bytes_ns * tile / strip if in_strips else c.rescale_bytes_ns
    other = (
        rows * tile * c.softmax_ops / vector
        + (results * rescale_ns + tile * (c.key_ns + c.locate_ns / task_heads) + c.tile_ns) / 1e3
    )
    if not direct:
        other += tile * heads.head_dim * 2 * c.transpose_ns / 1e3
    if spec.score is not None and settings.get("score_method") != "remat":
        kept = DTYPE_BYTES[str(settings.get("score_dump", "float32"))]
        other += rows * tile * kept * c.dump_ns / 1e3
    other += (products + other) * c.spill_cost * max(0.0, math.log2(scratch / c.cache_bytes))
    compute = products + other
    if plan["prefetch"] == "none":
        per_tile = memory + compute
    else:
        # A task's heads take turns at one tile, so all of them have the next one under way.
        hidden = c.overlap * min(memory, compute) / (1 + (tile_bytes * task_heads / c.far_bytes) ** 2)
        if plan["prefetch"] == "next_tile_l1":
            hidden /= 1 + tile_bytes / c.near_bytes
        per_tile = memory + compute - hidden

    # Tasks, full ones first within a request, taken in order by whoever is free.
    splits = math.ceil(keys / split)
    lengths = [math.ceil(min(split, keys - index * split) / tile) for index in range(splits)]
    per_request = heads.num_kv_heads // task_heads
    count = workload.batch * per_request
    task_us = [length * per_tile * task_heads + c.task_us for length in lengths]
    work = sum(task_us) * count
    busiest = work / cores
    if splits * count <= DENSE_LIMIT:
        ends = [0.0] * cores
        for one in task_us * count:
            heapq.heapreplace(ends, ends[0] + one)
        busiest = max(ends)
    partials = workload.batch * heads.num_kv_heads * splits * rows * heads.v_head_dim * FLOAT_BYTES
    merge = partials * c.merge_ns / 1e3 / cores
    limits = {"memory": memory, "products": products, "keys and softmax": other}
    return (
        Term(name="tasks", microseconds=work / cores, limit=max(limits, key=limits.__getitem__)),
        Term(name="last tasks", microseconds=busiest - work / cores, limit="balance"),
        Term(name="merge", microseconds=merge, limit="memory"),
    )


def cpu_residency(spec: KernelSpec, plan: Plan, arch: Arch) -> Residency:
    """A task a core, with the tile it works on and the one it has asked for."""
    heads = spec.heads
    task_heads = heads.num_kv_heads if plan["heads_per_task"] == "all" else 1
    tile = plan.integer("key_tile") * task_heads * (heads.head_dim + heads.v_head_dim) * spec.cache_bytes
    ahead = 0 if plan["prefetch"] == "none" else tile
    return Residency(
        blocks_per_sm=1,
        warps_per_sm=1,
        occupancy=1.0,
        bytes_in_flight=float(arch.num_sms * ahead),
        bytes_to_saturate=MEMORY_LATENCY_US * (arch.bandwidth_gbs or USUAL_BANDWIDTH_GBS) * 1e3,
    )
