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
    """The least work, and what the plan's way to exact scores adds were nothing of it to stay in a cache: kept weights
    that are written and read again, or the keys a second time with their products. A reference needs neither."""
    least = least_work(spec, workload)
    if spec.score is None or spec.score.normaliser == "reference":
        return least
    heads, settings = spec.heads, plan.as_dict()
    rows = {"all": workload.q_len, "ends": min(2, workload.q_len), "last": 1}[spec.score.rows]
    weights = workload.batch * rows * heads.num_q_heads * (workload.kv_len - workload.q_len)
    if settings.get("score_method") == "remat":
        keys = workload.batch * workload.kv_len * heads.num_kv_heads * heads.head_dim * spec.cache_bytes
        return Work(memory_bytes=least.memory_bytes + keys, operations=least.operations + 2 * weights * heads.head_dim)
    kept = DTYPE_BYTES[str(settings.get("score_dump", spec.dtype))]
    return Work(memory_bytes=least.memory_bytes + 2 * weights * kept, operations=least.operations)
