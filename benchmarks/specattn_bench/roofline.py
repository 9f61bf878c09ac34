"""The least a call can take on this machine, and what a method of making scores adds to it. Measures nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from specattn_bench.ceilings import Ceilings
from specattn_codegen.cost_model.floor import Work, least_work
from specattn_codegen.plan import Plan
from specattn_codegen.spec import DTYPE_BYTES, KernelSpec, Workload

Bound = Literal["memory", "operations"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Floor:
    """microseconds: the longer of `bytes / bandwidth` and `operations / rate`; bound: which of them it is."""

    microseconds: float
    bound: Bound


def floor_of(work: Work, dtype: str, ceilings: Ceilings) -> Floor:
    """The roofline (Williams, Waterman and Patterson, CACM 2009) under measured ceilings."""
    memory = work.memory_bytes / (ceilings.bandwidth_gbs * 1e3)
    operations = work.operations / (ceilings.tflops[dtype] * 1e6)
    return Floor(microseconds=max(memory, operations), bound="memory" if memory >= operations else "operations")


def cache_bytes(spec: KernelSpec, workload: Workload) -> int:
    """The K and V every call must read, once."""
    heads = spec.heads
    per_key = heads.num_kv_heads * (heads.head_dim + heads.v_head_dim) * spec.cache_bytes
    return workload.batch * workload.kv_len * per_key


def method_work(spec: KernelSpec, workload: Workload, plan: Plan) -> Work:
    """The least work, and what exact weights cost besides: kept until the log-sum-exps of the scored rows are known,
    they are written and read once each, were none of them to stay in a cache; made again, K is read and multiplied a
    second time."""
    least, settings = least_work(spec, workload), plan.as_dict()
    if spec.score is None or "score_method" not in settings:
        return least
    rows = {"all": workload.q_len, "ends": min(2, workload.q_len), "last": 1}[spec.score.rows]
    prefix, heads = workload.batch * (workload.kv_len - workload.q_len), spec.heads
    weights = rows * heads.num_q_heads * prefix
    if settings["score_method"] == "dump":
        kept = 2 * weights * DTYPE_BYTES[str(settings["score_dump"])]
        return Work(memory_bytes=least.memory_bytes + kept, operations=least.operations)
    return Work(
        memory_bytes=least.memory_bytes + prefix * heads.num_kv_heads * heads.head_dim * spec.cache_bytes,
        operations=least.operations + 2 * weights * heads.head_dim,
    )
