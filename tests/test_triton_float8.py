"""Triton's attention over 8-bit caches: every byte decoded exactly, scales of one element or one per KV head."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from specattn_codegen.heads import HeadConfig
from specattn_codegen.kernel import AttentionCall
from specattn_codegen.proof.problems import TORCH_DTYPES, Layout, attention_problem
from specattn_codegen.spec import FLOAT8, KvDtype, ScoreSpec
from triton_cases import DEVICE, SMALL, attention_kernel, run, sparse_spec, verdict, verify_spec

PAIRS: list[tuple[KvDtype, str]] = [
    ("float8_e4m3", "native"),
    ("float8_e4m3", "bits"),
    ("float8_e5m2", "native"),
    ("float8_e5m2", "bits"),
]


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul:RuntimeWarning")  # signalling NaN
@pytest.mark.parametrize(("kv_dtype", "conversion"), PAIRS)
def test_every_byte_stands_for_its_value(kv_dtype: KvDtype, conversion: str) -> None:
    """One key, hence weight 1: out is the value row, which holds all 256 bytes."""
    heads = HeadConfig(num_q_heads=1, num_kv_heads=1, head_dim=16, v_head_dim=256)
    kernel = attention_kernel(verify_spec(heads, dtype="float32", kv_dtype=kv_dtype), float8=conversion)
    problem = attention_problem(kernel.spec, q_lens=[1], kv_lens=[1], page_size=16, seed=0)
    bytes_ = torch.arange(256, dtype=torch.uint8)
    problem.v_cache.view(torch.uint8)[int(problem.page_table[0, 0]), 0, 0] = bytes_
    out = run(kernel, dataclasses.replace(problem, v_scale=torch.ones(1))).out.cpu()[0, 0]
    expected = bytes_.view(TORCH_DTYPES[kv_dtype]).float()
    # The interpreter's own conversion knows no infinity and no NaN.
    known = (
        expected.isfinite() if conversion == "native" and DEVICE.type == "cpu" else torch.ones(256, dtype=torch.bool)
    )
    assert torch.equal(out[known].nan_to_num(nan=-1.0), expected[known].nan_to_num(nan=-1.0))


@pytest.mark.parametrize(("kv_dtype", "conversion"), PAIRS)
@pytest.mark.parametrize("layout", ["hnd", "interleaved"])
def test_attention_over_an_8_bit_cache(layout: Layout, kv_dtype: KvDtype, conversion: str) -> None:
    """Unused slots hold NaN here too. Scales differ between heads for K and are one for all for V."""
    dtype = "float32" if layout == "hnd" else "float16"
    for spec in (
        verify_spec(SMALL, ScoreSpec(), dtype, 16, kv_dtype),
        sparse_spec(SMALL, "layer", dtype, 16, kv_dtype),
    ):
        kernel = attention_kernel(spec, float8=conversion)
        problem = attention_problem(
            spec, q_lens=[2, 1], kv_lens=[50, 7], page_size=16, seed=1, layout=layout, budget=20
        )
        result = verdict(kernel, problem)
        assert result.passed, (spec.op, result.detail)


@pytest.mark.parametrize("method", ["remat", "dump"])
def test_scales_reach_scores_softcap_and_sinks(method: str) -> None:
    heads = dataclasses.replace(SMALL, v_head_dim=48, softcap=2.0, sinks=True, window=30)
    spec = verify_spec(heads, ScoreSpec(), "float32", 16, "float8_e4m3")
    kernel = attention_kernel(spec, score_method=method)
    problem = attention_problem(spec, q_lens=[2, 1], kv_lens=[50, 7], page_size=16, seed=2)
    assert problem.k_scale is not None
    problem = dataclasses.replace(problem, v_scale=problem.k_scale.flip(0) * 3.0)
    result = verdict(kernel, problem)
    assert result.passed, result.detail


@pytest.mark.parametrize("kv_dtype", FLOAT8)
def test_two_pages_2_gigabytes_apart(kv_dtype: KvDtype) -> None:
    """Offsets past 2^31 elements; the memory between the pages is never touched, so it is never there."""
    stride = 2**31 + 4096
    spec = verify_spec(SMALL, dtype="float32", kv_dtype=kv_dtype)
    problem = attention_problem(spec, q_lens=[2], kv_lens=[30], page_size=16, seed=3)
    near = run(attention_kernel(spec), problem)
    page = problem.k_cache[0].numel()
    far = torch.from_numpy(np.zeros(stride + 2 * page, dtype=np.uint8))
    table = problem.page_table.clone()
    caches = []
    for place, cache in enumerate((problem.k_cache, problem.v_cache)):
        view = far[place * page :].as_strided((2, *cache.shape[1:]), (stride, *cache[0].contiguous().stride()))
        for index in range(2):
            view[index] = cache[int(problem.page_table[0, index])].contiguous().view(torch.uint8)
            table[0, index] = index
        caches.append(view.view(cache.dtype))
    call = run(
        attention_kernel(spec),
        dataclasses.replace(problem, k_cache=caches[0], v_cache=caches[1], page_table=table),
    )
    assert isinstance(call, AttentionCall)
    assert torch.equal(call.out, near.out)
    assert torch.equal(call.lse, near.lse)
