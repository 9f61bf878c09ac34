"""The CPU's search space: every axis and every constraint of its C++ templates."""

from __future__ import annotations

from specattn_codegen.arch import Arch
from specattn_codegen.plan import Plan
from specattn_codegen.space.axis import Axis
from specattn_codegen.spec import KernelSpec

LANES = {"avx512-bf16": 16, "avx512": 16, "avx2": 8, "generic": 4}


def axes(spec: KernelSpec) -> tuple[Axis, ...]:
    if spec.op == "select_kv":
        return (Axis("radix_bits", (8, 11)),)
    heads_per_task = ("one",) if spec.selection == "kv_head" else ("one", "all")
    attention = (
        Axis("key_tile", (16, 32, 64, 128)),
        Axis("split_keys", (256, 512, 1024, 2048, 4096)),
        Axis("heads_per_task", heads_per_task),
        Axis("prefetch", ("none", "next_tile")),
    )
    if spec.score is None:
        return attention
    dumps = ("float32",) if spec.dtype == "float32" else ("float32", "float16")
    return (*attention, Axis("score_dump", dumps))


def default_plan(spec: KernelSpec, arch: Arch) -> Plan:  # noqa: ARG001 - the same plan serves every CPU
    if spec.op == "select_kv":
        return Plan.of("cpu", radix_bits=11)
    plan = Plan.of("cpu", key_tile=32, split_keys=1024, heads_per_task="one", prefetch="next_tile")
    return plan if spec.score is None else plan.replace(score_dump=axes(spec)[-1].values[-1])


def why_invalid(plan: Plan, spec: KernelSpec, arch: Arch) -> str | None:
    if spec.op == "select_kv":
        return None
    if plan.integer("key_tile") < LANES[arch.target]:
        return f"key_tile={plan['key_tile']} is narrower than the {LANES[arch.target]} lanes of {arch.target}"
    if plan.integer("split_keys") % plan.integer("key_tile"):
        return f"split_keys={plan['split_keys']} is not a multiple of key_tile={plan['key_tile']}"
    return None
