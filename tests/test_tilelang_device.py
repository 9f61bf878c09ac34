"""TileLang on a GPU: every plan that a CPU can only compile is proved here, by `pytest -m gpu`."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from specattn_codegen import build, space
from specattn_codegen.errors import BuildError
from specattn_codegen.plan import Plan
from specattn_codegen.processors import gpu_detect
from specattn_codegen.proof.prove import ON_DEVICE, prove
from specattn_codegen.render import render
from specattn_codegen.space.triton import score_methods
from specattn_codegen.spec import KernelSpec, ScoreSpec, Workload

pytest.importorskip("tilelang", reason="TileLang is not installed")

from tilelang_cases import SELECT, SMALL, mixed_spec, plan_for, sparse_spec, verify_spec

WORKLOAD = Workload(batch=1, q_len=5, kv_len=2500, budget=256)
SPECS = (
    verify_spec(SMALL),
    verify_spec(SMALL, ScoreSpec()),
    verify_spec(SMALL, ScoreSpec(rows="ends", heads="layer")),
    verify_spec(SMALL, ScoreSpec(normaliser="reference")),
    verify_spec(SMALL, ScoreSpec(value="logit", granularity="page_max")),
    verify_spec(SMALL, ScoreSpec(granularity="page_mean", histogram=True)),
    verify_spec(SMALL, ScoreSpec(granularity="page_max"), page_size=100),
    dataclasses.replace(verify_spec(SMALL, ScoreSpec()), kv_dtype="float8_e4m3"),
    dataclasses.replace(sparse_spec(SMALL), kv_dtype="float8_e5m2"),
    sparse_spec(SMALL),
    mixed_spec(SMALL),
    mixed_spec(SMALL, ScoreSpec()),
    mixed_spec(SMALL, ScoreSpec(histogram=True)),
    SELECT,
)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_kernels_equal_the_oracle(spec: KernelSpec) -> None:
    arch = gpu_detect.local()
    other = Plan.of("tilelang", block_n=1024, num_warps=4, radix_bits=11, max_splits=8)
    plans = [space.default_plan(spec, arch, "tilelang"), other if spec is SELECT else plan_for(spec)]
    if spec.score is not None:  # by every way to make it
        plans += [plan_for(spec, score_method=method) for method in score_methods(spec.score)[1:]]
    for plan in plans:
        _prove(spec, plan)


FED = tuple(
    spec_of(SMALL, score, page_size=64)
    for spec_of in (verify_spec, mixed_spec)
    for score in (None, ScoreSpec(), ScoreSpec(normaliser="reference"))
)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("spec", FED, ids=lambda spec: spec.name)
@pytest.mark.parametrize("block_m", [16, 64])
def test_kernels_that_the_accelerator_feeds_equal_the_oracle(spec: KernelSpec, block_m: int) -> None:
    """64 rows are what warp groups multiply; each cache layout is described with strides of its own."""
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
