"""Cross-compiles kernels in a process without TRITON_INTERPRET, as test_triton_cross_compile asks of it.

python compile_matrix.py ARCH...      prints {"ARCH kernel-name": {"plan": ..., "resources": [...]}} as JSON
"""

from __future__ import annotations

import dataclasses
import json
import sys

from specattn_codegen import space
from specattn_codegen.build.cross_compile import cross_compile
from specattn_codegen.digest import to_plain
from specattn_codegen.errors import BuildError
from specattn_codegen.heads import HeadConfig
from specattn_codegen.plan import Plan
from specattn_codegen.processors import gpus
from specattn_codegen.processors.arch import Arch
from specattn_codegen.render import render
from specattn_codegen.spec import KernelSpec, ScoreSpec

LLAMA = HeadConfig(num_q_heads=32, num_kv_heads=8, head_dim=128)
REFERENCE = ScoreSpec(normaliser="reference")
UNUSUAL = HeadConfig(num_q_heads=24, num_kv_heads=8, head_dim=80, v_head_dim=112, softcap=50.0, window=4096, sinks=True)


def verify(heads: HeadConfig, score: ScoreSpec | None, page_size: int = 16) -> KernelSpec:
    return KernelSpec(op="verify_attention", heads=heads, dtype="bfloat16", page_size=page_size, score=score)


# One head shape for each architecture: (group, head_dim, v_head_dim).
SHAPES = {
    "a100": (8, 64, 64),
    "a10": (3, 80, 80),
    "l4": (8, 96, 96),
    "h100": (7, 112, 112),
    "b200": (5, 160, 128),
    "rtx5090": (4, 192, 128),
    "mi300x": (8, 256, 256),
}


def shaped(arch: Arch) -> HeadConfig:
    group, head_dim, v_head_dim = SHAPES[arch.name]
    return HeadConfig(num_q_heads=2 * group, num_kv_heads=2, head_dim=head_dim, v_head_dim=v_head_dim)


def matrix(arch: Arch) -> list[tuple[str, KernelSpec, Plan]]:
    """Default plans of every operation for Llama 3 8B and for one more shape; on two targets also what is rendered
    differently."""
    select = KernelSpec(op="select_kv", heads=LLAMA, selection="kv_head")
    sparse = KernelSpec(op="sparse_attention", heads=LLAMA, dtype="bfloat16", page_size=16, selection="kv_head")
    specs = {
        "scores": verify(LLAMA, ScoreSpec()),
        "reference, float8": dataclasses.replace(verify(LLAMA, REFERENCE), kv_dtype="float8_e4m3"),
        "another shape": dataclasses.replace(verify(shaped(arch), REFERENCE), kv_dtype="float8_e5m2"),
        "select": select,
        "sparse": sparse,
        "mixed": dataclasses.replace(verify(LLAMA, REFERENCE), op="mixed_attention", selection="kv_head"),
    }
    if arch.name in ("h100", "mi300x"):
        specs |= {
            "no scores": verify(LLAMA, None),
            "layer": verify(LLAMA, ScoreSpec(rows="ends", heads="layer")),
            "logits of pages": verify(LLAMA, ScoreSpec(value="logit", heads="layer", granularity="page_max")),
            "counted pages": verify(LLAMA, ScoreSpec(granularity="page_mean", histogram=True), page_size=880),
            "one page a tile": verify(LLAMA, None, page_size=64),
            "unusual heads": verify(UNUSUAL, ScoreSpec(rows="last")),
            "unusual heads, sparse": dataclasses.replace(
                sparse, heads=UNUSUAL, selection="layer", kv_dtype="float8_e4m3"
            ),
            "float32": dataclasses.replace(verify(LLAMA, ScoreSpec()), dtype="float32"),
        }
    entries = [(name, spec, space.default_plan(spec, arch, "triton")) for name, spec in specs.items()]
    if "layer" in specs:
        dumped = space.default_plan(specs["layer"], arch, "triton").replace(score_method="dump")
        entries.append(("dump", specs["layer"], dumped))
        fixed = space.batch_invariant(space.default_plan(specs["unusual heads"], arch, "triton"))
        entries.append(("fixed splits", specs["unusual heads"], fixed))
    if arch.vendor == "nvidia":
        last = space.default_plan(specs["reference, float8"], arch, "triton").replace(merge="fused")
        entries.append(("last block merges", specs["reference, float8"], last))
    if arch.name in ("h100", "b200"):
        paged = dataclasses.replace(verify(LLAMA, REFERENCE), page_size=64)
        described = space.default_plan(paged, arch, "triton").replace(kv_load="descriptor")
        entries.append(("descriptors", paged, described))
    return entries


def compile_all(arch: Arch) -> dict[str, object]:
    results: dict[str, object] = {}
    for name, spec, plan in matrix(arch):
        resources = cross_compile(render(spec, plan, "triton"), arch)
        estimate = 0 if spec.op == "select_kv" else space.triton.smem_bytes(plan, spec, arch)
        results[f"{arch.name} {name}"] = {"resources": to_plain(resources), "estimate": estimate}
    return results


def broken_source(arch: Arch) -> dict[str, object]:
    """A kernel whose product has mismatched shapes: the compiler's complaint must come back as one line."""
    spec = verify(LLAMA, None)
    source = render(spec, space.default_plan(spec, arch, "triton"), "triton")
    try:
        cross_compile(dataclasses.replace(source, text=source.text.replace("tl.dot(q, k)", "tl.dot(q, q)")), arch)
    except BuildError as error:
        return {"broken": str(error)}
    return {}


if __name__ == "__main__":
    found: dict[str, object] = {}
    for arch_name in sys.argv[1:]:
        found |= compile_all(gpus.find(arch_name))
    if "h100" in sys.argv:
        found |= broken_source(gpus.find("h100"))
    print(json.dumps(found))
