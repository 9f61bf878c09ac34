"""TileLang on a GPU: every plan that a CPU can only compile is proved here, by `pytest -m gpu`."""

from __future__ import annotations

import pytest
import torch

from specattn_codegen import build, gpu_detect, space
from specattn_codegen.errors import BuildError
from specattn_codegen.plan import Plan
from specattn_codegen.prove import ON_DEVICE, prove
from specattn_codegen.render import render
from specattn_codegen.spec import KernelSpec, ScoreSpec, Workload

pytest.importorskip("tilelang", reason="TileLang is not installed")

from tilelang_cases import SMALL, mixed_spec, plan_for, sparse_spec, verify_spec

SELECT = KernelSpec(op="select_kv", heads=SMALL, selection="kv_head")
WORKLOAD = Workload(batch=1, q_len=5, kv_len=2500, budget=256)
SPECS = (
    verify_spec(SMALL),
    verify_spec(SMALL, ScoreSpec()),
    verify_spec(SMALL, ScoreSpec(rows="ends", heads="layer")),
    verify_spec(SMALL, ScoreSpec(normaliser="reference")),
    sparse_spec(SMALL),
    mixed_spec(SMALL),
    mixed_spec(SMALL, ScoreSpec()),
    SELECT,
)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_kernels_equal_the_oracle(spec: KernelSpec) -> None:
    arch = gpu_detect.local()
    other = Plan.of("tilelang", block_n=1024, num_warps=4, radix_bits=11, max_splits=8)
    for plan in (space.default_plan(spec, arch, "tilelang"), other if spec is SELECT else plan_for(spec)):
        _prove(spec, plan)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("score", [None, ScoreSpec(), ScoreSpec(normaliser="reference")], ids=str)
@pytest.mark.parametrize("block_m", [16, 64])
def test_kernels_that_the_accelerator_feeds_equal_the_oracle(score: ScoreSpec | None, block_m: int) -> None:
    """64 rows are what warp groups multiply; each cache layout is described with strides of its own."""
    spec = verify_spec(SMALL, score, page_size=64)
    plan = plan_for(spec, kv_load="descriptor", num_stages=3, block_m=block_m)
    reason = space.why_invalid(plan, spec, gpu_detect.local())
    if reason is not None:
        pytest.skip(reason)
    _prove(spec, plan)


def _prove(spec: KernelSpec, plan: Plan) -> None:
    kernel = build.load(render(spec, plan, "tilelang"))
    result = prove(kernel, workload=WORKLOAD, page_size=spec.page_size or 16, seed=1, device="cuda", extent=ON_DEVICE)
    assert result.passed, (plan, result.detail)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_nothing_is_loaded() -> None:
    spec = SPECS[0]
    with pytest.raises(BuildError, match="need an NVIDIA GPU"):
        build.load(render(spec, plan_for(spec), "tilelang"))
