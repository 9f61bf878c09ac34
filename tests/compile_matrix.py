"""Cross-compiles kernels in a process without TRITON_INTERPRET, as test_triton_cross_compile asks of it.

python compile_matrix.py ARCH...      prints {"ARCH kernel-name": {"plan": ..., "resources": [...]}} as JSON
"""

from __future__ import annotations

import dataclasses
import json
import sys

from specattn_codegen import gpus, space
from specattn_codegen.arch import Arch
from specattn_codegen.build.cross_compile import cross_compile
from specattn_codegen.digest import to_plain
from specattn_codegen.errors import BuildError
from specattn_codegen.heads import HeadConfig
from specattn_codegen.plan import Plan
from specattn_codegen.render import render
from specattn_codegen.spec import KernelSpec, ScoreSpec

LLAMA = HeadConfig(num_q_heads=32, num_kv_heads=8, head_dim=128)
UNUSUAL = HeadConfig(num_q_heads=24, num_kv_heads=8, head_dim=80, v_head_dim=112, softcap=50.0, window=4096, sinks=True)


def verify(heads: HeadConfig, score: ScoreSpec | None, page_size: int = 16) -> KernelSpec:
    return KernelSpec(op="verify_attention", heads=heads, dtype="bfloat16", page_size=page_size, score=score)


def matrix(arch: Arch) -> list[tuple[str, KernelSpec, Plan]]:
    """The default plan of every operation for Llama 3 8B; on two targets also what is rendered differently."""
    select = KernelSpec(op="select_kv", heads=LLAMA, selection="kv_head")
    sparse = KernelSpec(op="sparse_attention", heads=LLAMA, dtype="bfloat16", page_size=16, selection="kv_head")
    specs = [verify(LLAMA, ScoreSpec()), select, sparse]
    entries = [(spec.name, spec, space.default_plan(spec, arch, "triton")) for spec in specs]
    if arch.name not in ("h100", "mi300x"):
        return entries
    layer = verify(LLAMA, ScoreSpec(rows="ends", heads="layer"))
    variants = {
        "no scores": verify(LLAMA, None),
        "layer": layer,
        "one page a tile": verify(LLAMA, None, page_size=64),
        "unusual heads": verify(UNUSUAL, ScoreSpec(rows="last")),
        "unusual heads, sparse": dataclasses.replace(sparse, heads=UNUSUAL, selection="layer"),
        "float32": dataclasses.replace(verify(LLAMA, ScoreSpec()), dtype="float32"),
    }
    entries += [(name, spec, space.default_plan(spec, arch, "triton")) for name, spec in variants.items()]
    dumped = space.default_plan(layer, arch, "triton").replace(score_method="dump")
    return [*entries, ("dump", layer, dumped)]


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
