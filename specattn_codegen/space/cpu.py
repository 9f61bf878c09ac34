"""The CPU's search space: every axis and every constraint of its C++ templates."""

from __future__ import annotations

from specattn_codegen.arch import Arch
from specattn_codegen.plan import Plan
from specattn_codegen.space.axis import Axis
from specattn_codegen.spec import KernelSpec

LANES = {"amx-bf16": 16, "avx512": 16, "avx2": 8, "generic": 4}


def axes(spec: KernelSpec) -> tuple[Axis, ...]:
    if spec.op == "select_kv":
        return (Axis("radix_bits", (8, 11)),)
    attention = (
        Axis("product", ("fma", "amx") if spec.dtype == "bfloat16" else ("fma",)),
        Axis("key_tile", (16, 32, 64, 128)),
        Axis("split_keys", (256, 512, 1024, 2048, 4096)),
        Axis("heads_per_task", ("one",) if spec.selection == "kv_head" else ("one", "all")),
        Axis("prefetch", ("none", "next_tile")),
    )
    if spec.score is None:
        return attention
    dumps = {"float32": ("float32",), "float16": ("float16", "float32"), "bfloat16": ("bfloat16", "float16", "float32")}
    return (*attention, Axis("score_dump", dumps[spec.dtype]))


def default_plan(spec: KernelSpec, arch: Arch) -> Plan:
    if spec.op == "select_kv":
        return Plan.of("cpu", radix_bits=11)
    tiles = spec.dtype == "bfloat16" and arch.target == "amx-bf16"
    plan = Plan.of("cpu", product="fma", key_tile=32, split_keys=1024, heads_per_task="one", prefetch="next_tile")
    if tiles:
        plan = plan.replace(product="amx", key_tile=64)
    if spec.score is None:
        return plan
    return plan.replace(score_dump="bfloat16" if tiles else "float32" if spec.dtype == "float32" else "float16")


def why_invalid(plan: Plan, spec: KernelSpec, arch: Arch) -> str | None:
    if spec.op == "select_kv":
        return None
    tiles = plan["product"] == "amx"
    if tiles and arch.target != "amx-bf16":
        return f"product=amx needs AMX tiles of bfloat16; this processor is {arch.target}"
    if tiles and plan.integer("key_tile") < 32:
        return f"key_tile={plan['key_tile']}: AMX multiplies 32 keys at a time"
    if plan.integer("key_tile") < LANES[arch.target]:
        return f"key_tile={plan['key_tile']} is narrower than the {LANES[arch.target]} lanes of {arch.target}"
    if plan.integer("split_keys") % plan.integer("key_tile"):
        return f"split_keys={plan['split_keys']} is not a multiple of key_tile={plan['key_tile']}"
    if spec.score is not None and (plan["score_dump"] == "bfloat16") != tiles:
        return f"score_dump={plan['score_dump']}: AMX leaves weights in bfloat16, multiply-adds in float32 or float16"
    return None
