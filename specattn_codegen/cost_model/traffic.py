"""Bytes that the kernels of one call move, array by array, beside the floor of what they cannot avoid."""

from __future__ import annotations

from specattn_codegen.cost_model.attention import (
    FLOAT_BYTES,
    row_tiles,
    scored_rows,
    scores_directly,
    used_splits,
    weight_bytes,
)
from specattn_codegen.cost_model.floor import keys_read, least_work
from specattn_codegen.plan import Plan
from specattn_codegen.processors.arch import Arch
from specattn_codegen.spec import KernelSpec, Workload


def bytes_moved(spec: KernelSpec, workload: Workload, plan: Plan, arch: Arch) -> int:
    """Inputs as often as they are read from memory, outputs once, scratch once written and once read.

    Blocks that read the same keys at the same time find them in the L2 and count once, as do the passes of select_kv
    over a row. Tiles that end in the middle of the keys count to the last key.
    """
    least = least_work(spec, workload).memory_bytes
    if spec.op == "select_kv":
        return least
    splits, _ = used_splits(spec, plan, workload, arch)
    rows = workload.batch * workload.q_len * spec.heads.num_q_heads
    partials = splits * rows * (spec.heads.v_head_dim + 1) * FLOAT_BYTES
    return least + 2 * partials + _score_bytes(spec, workload, plan)


def _score_bytes(spec: KernelSpec, workload: Workload, plan: Plan) -> int:
    """Bytes that scores cost besides themselves."""
    if spec.score is None or scores_directly(spec, plan, workload):
        return 0
    heads, prefix = spec.heads, workload.kv_len - workload.q_len
    if plan["score_method"] == "remat":  # every prefix key again
        return workload.batch * prefix * heads.num_kv_heads * heads.head_dim * spec.cache_bytes
    kept = workload.batch * min(prefix, keys_read(spec, workload))
    if plan["score_method"] == "fused":
        return 2 * row_tiles(spec, plan, workload) * kept * heads.num_kv_heads * FLOAT_BYTES
    dumped = scored_rows(spec.score, workload) * heads.num_q_heads * kept
    return 2 * (dumped * weight_bytes(spec) + dumped // plan.integer("block_n") * FLOAT_BYTES)
