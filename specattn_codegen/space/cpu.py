"""The CPU's search space: every axis and every constraint of its C++ templates."""

from __future__ import annotations

from specattn_codegen.plan import Plan
from specattn_codegen.processors.arch import Arch
from specattn_codegen.space.axis import Axis
from specattn_codegen.spec import KernelSpec

LANES = {"amx-bf16": 16, "avx512-bf16": 16, "avx512": 16, "avx2": 8, "generic": 4}

PRODUCT_TARGETS = {"bf16": ("amx-bf16", "avx512-bf16"), "amx": ("amx-bf16",)}
FEW_CORES = 8  # whose tasks may take every head of a layer, which reads memory in order; more cores want more tasks


def axes(spec: KernelSpec) -> tuple[Axis, ...]:
    """The tile engine, its tile, and how the keys of a request are dealt to tasks.

    split_keys  keys of a task, an argument of the binary, which plans that differ by it share
    prefetch    next_tile: a tile's rows are fetched into the second-level cache while the one before is worked on;
                next_tile_l1: into the first
    score_dump  what the scored rows' weights are kept in
    """
    if spec.op == "select_kv":
        return (Axis("sampled", (512, 1024, 2048, 4096)),)
    attention = (
        Axis("product", ("fma", "bf16", "amx") if _has_bfloat16_products(spec) else ("fma",)),
        Axis("key_tile", (16, 32, 48, 64, 96, 128, 192, 256)),
        Axis("split_keys", (256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 8192)),
        Axis("heads_per_task", ("one",) if _has_a_selection_per_head(spec) else ("one", "all")),
        Axis("prefetch", ("none", "next_tile", "next_tile_l1")),
    )
    if not has_exact_weights(spec):
        return attention
    dumps = {"float32": ("float32",), "float16": ("float16", "float32"), "bfloat16": ("bfloat16", "float16", "float32")}
    return (*attention, Axis("score_method", ("dump", "remat")), Axis("score_dump", dumps[spec.dtype]))


def has_exact_weights(spec: KernelSpec) -> bool:
    """Whether scores need each row's log-sum-exp: its weights wait in the workspace until it is known (dump), or are
    made again from K then (remat), which reads more and needs no workspace."""
    score = spec.score
    return score is not None and score.value == "weight" and score.normaliser == "exact"


def _has_a_selection_per_head(spec: KernelSpec) -> bool:
    """Whether the heads of every request read keys of their own; in a mixed batch those of a verifying one do not."""
    return spec.op == "sparse_attention" and spec.selection == "kv_head"


def _has_bfloat16_products(spec: KernelSpec) -> bool:
    return spec.dtype == "bfloat16" and not spec.is_float8


def default_plan(spec: KernelSpec, arch: Arch) -> Plan:
    if spec.op == "select_kv":
        return Plan.of("cpu", sampled=1024)
    product = "fma"
    if _has_bfloat16_products(spec) and arch.target in PRODUCT_TARGETS["bf16"]:
        product = "amx" if arch.target in PRODUCT_TARGETS["amx"] else "bf16"
    scattered = _has_a_selection_per_head(spec)
    whole_layer = not scattered and arch.num_sms <= FEW_CORES
    plan = Plan.of(
        "cpu",
        product=product,
        key_tile=32 if scattered else 64,
        split_keys=1024,
        heads_per_task="all" if whole_layer else "one",
        prefetch="next_tile",
    )
    if not has_exact_weights(spec):
        return plan
    return plan.replace(score_method="dump", score_dump=_smallest_dump(spec, product))


def _smallest_dump(spec: KernelSpec, product: str) -> str:
    """The smallest type that holds weights as a product leaves them within their tolerance."""
    if product != "fma":
        return "bfloat16"
    return "float32" if spec.dtype == "float32" else "float16"


def batch_invariant(plan: Plan) -> Plan:
    """Splits always have a fixed length here, but product=bf16 adds up the logits of few rows in another order than
    those of many: product=fma gives a row the same bits whatever rows come with it."""
    if plan.as_dict().get("product") != "bf16":
        return plan
    dump = {"score_dump": "float16"} if "score_dump" in plan.as_dict() else {}
    return plan.replace(product="fma", **dump)


def why_invalid(plan: Plan, spec: KernelSpec, arch: Arch) -> str | None:
    if spec.op == "select_kv":
        return None
    product = str(plan["product"])
    if arch.target not in PRODUCT_TARGETS.get(product, (arch.target,)):
        return f"product={product} needs {' or '.join(PRODUCT_TARGETS[product])}; this processor is {arch.target}"
    if product != "fma" and plan.integer("key_tile") % 32:
        return f"key_tile={plan['key_tile']}: product={product} takes 32 keys at a time"
    if plan.integer("key_tile") < LANES[arch.target]:
        return f"key_tile={plan['key_tile']} is narrower than the {LANES[arch.target]} lanes of {arch.target}"
    if plan.integer("split_keys") % plan.integer("key_tile"):
        return f"split_keys={plan['split_keys']} is not a multiple of key_tile={plan['key_tile']}"
    if has_exact_weights(spec) and (plan["score_dump"] == "bfloat16") != (product != "fma"):
        return f"score_dump={plan['score_dump']}: product=fma has weights in float32, the others in bfloat16"
    if (
        has_exact_weights(spec)
        and plan["score_method"] == "remat"
        and plan["score_dump"] != _smallest_dump(spec, product)
    ):
        return f"score_dump={plan['score_dump']}: score_method=remat keeps no weights; leave the smallest"
    return None
