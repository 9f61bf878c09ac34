"""TileLang's templates against the float64 oracle, by the same rendered text through TileLang's C target."""

from __future__ import annotations

import dataclasses
from typing import get_args

import pytest
import torch

from specattn_codegen.calls import problem_call
from specattn_codegen.errors import BuildError
from specattn_codegen.heads import HeadConfig
from specattn_codegen.plan import Setting
from specattn_codegen.proof.check import check_attention
from specattn_codegen.proof.problems import TORCH_DTYPES, Layout, attention_problem
from specattn_codegen.render import render
from specattn_codegen.spec import FLOAT8, KvDtype, ScoreSpec

pytest.importorskip("tilelang", reason="TileLang is not installed")

from specattn_codegen.build import tilelang_twin
from tilelang_cases import SMALL, plan_for, run, sparse_spec, twin, verdict, verify_spec

# No rows, no keys, padding, rows before every key, one key, several tiles and pages, a tile that ends on a page.
Q_LENS, KV_LENS = [3, 0, 1, 2, 1, 5, 2], [100, 40, 64, 1, -3, 33, 0]
ODD = HeadConfig(num_q_heads=6, num_kv_heads=2, head_dim=48, v_head_dim=80, scale=0.3)
WINDOWED = dataclasses.replace(SMALL, window=37)

KEPT: dict[str, Setting] = {"score_method": "dump"}
AGAIN: dict[str, Setting] = {"score_method": "remat"}
SCORED: dict[str, tuple[HeadConfig, ScoreSpec, dict[str, Setting]]] = {
    "pillar": (SMALL, ScoreSpec(), AGAIN),
    "pillar, weights kept": (SMALL, ScoreSpec(), KEPT),
    "vegas": (SMALL, ScoreSpec(rows="ends", heads="layer"), AGAIN),
    "vegas, weights kept": (SMALL, ScoreSpec(rows="ends", heads="layer"), KEPT),
    "last, fixed splits": (ODD, ScoreSpec(rows="last"), {**KEPT, "split_keys": 512, "ctas_per_sm": 1}),
    "last, several tiles of rows": (ODD, ScoreSpec(rows="last", granularity="page_max"), {**AGAIN, "block_m": 32}),
    "weights of a window": (WINDOWED, ScoreSpec(heads="layer"), {**KEPT, "block_m": 32}),
    "weights of a window, keys read again": (WINDOWED, ScoreSpec(heads="layer", granularity="page_mean"), AGAIN),
    "reference": (ODD, ScoreSpec(normaliser="reference"), {}),
    "reference of a layer": (WINDOWED, ScoreSpec(rows="ends", heads="layer", normaliser="reference"), {}),
    "logits": (dataclasses.replace(SMALL, softcap=2.5), ScoreSpec(value="logit"), {}),
    "logits, keys read again": (dataclasses.replace(SMALL, softcap=2.5), ScoreSpec(value="logit"), AGAIN),
    "logits of a window": (WINDOWED, ScoreSpec(rows="ends", heads="layer", value="logit"), {"block_n": 64}),
    "logits of a window, keys read again": (
        WINDOWED,
        ScoreSpec(rows="ends", heads="layer", value="logit", granularity="page_max"),
        AGAIN,
    ),
}
# By what attend_splits leaves for score_keys, pages of one key, of an odd number, and of more than a tile of scores.
PAGED: dict[str, tuple[ScoreSpec, int, dict[str, Setting]]] = {
    "one key": (ScoreSpec(value="logit", granularity="page_mean"), 1, {}),
    "seven keys, counted": (
        ScoreSpec(normaliser="reference", heads="layer", granularity="page_mean", histogram=True),
        7,
        {},
    ),
    "sixteen keys, weights kept, counted": (
        ScoreSpec(rows="ends", heads="layer", granularity="page_max", histogram=True),
        16,
        KEPT,
    ),
    "a hundred keys": (ScoreSpec(granularity="page_mean"), 100, AGAIN),
    "a hundred keys, counted": (ScoreSpec(normaliser="reference", granularity="page_max", histogram=True), 100, {}),
}


@pytest.mark.parametrize("name", SCORED)
def test_outputs_and_scores_equal_the_oracle(name: str) -> None:
    heads, score, changes = SCORED[name]
    kernel = twin(verify_spec(heads, score), **changes)
    problem = attention_problem(kernel.spec, q_lens=Q_LENS, kv_lens=KV_LENS, page_size=16, seed=1, magnitude=4.0)
    result = verdict(kernel, problem)
    assert result.passed, result.detail
    longer = attention_problem(kernel.spec, q_lens=[5, 2], kv_lens=[700, 29], page_size=16, seed=2, layout="hnd")
    result = verdict(kernel, longer)
    assert result.passed, result.detail


@pytest.mark.parametrize("name", PAGED)
def test_scores_of_pages_and_histograms_equal_the_oracle(name: str) -> None:
    """Counts are exact, also of requests without a score, and the same when a launch finds older ones."""
    score, page_size, changes = PAGED[name]
    kernel = twin(verify_spec(SMALL, score, page_size), **changes)
    for q_lens, kv_lens in ((Q_LENS, KV_LENS), ([5, 2], [700, 29])):
        problem = attention_problem(
            kernel.spec, q_lens=q_lens, kv_lens=kv_lens, page_size=page_size, seed=1, magnitude=4.0
        )
        result = verdict(kernel, problem)
        assert result.passed, result.detail
    call = problem_call(kernel.spec, problem)
    if call.histogram is not None:
        call.histogram.fill_(7)
        kernel.launch(call, torch.zeros(kernel.workspace_bytes(call), dtype=torch.uint8))
        result = check_attention(kernel.spec, problem, call.out, call.lse, call.scores, histogram=call.histogram)
        assert result.passed, result.detail


@pytest.mark.parametrize("kv_dtype", FLOAT8)
def test_every_byte_of_an_8_bit_cache_stands_for_its_value(kv_dtype: KvDtype) -> None:
    """One key, hence weight 1: out is the value row, which holds all 256 bytes."""
    heads = HeadConfig(num_q_heads=1, num_kv_heads=1, head_dim=16, v_head_dim=256)
    kernel = twin(dataclasses.replace(verify_spec(heads), kv_dtype=kv_dtype))
    problem = attention_problem(kernel.spec, q_lens=[1], kv_lens=[1], page_size=16, seed=0)
    bytes_ = torch.arange(256, dtype=torch.uint8)
    problem.v_cache.view(torch.uint8)[int(problem.page_table[0, 0]), 0, 0] = bytes_
    out = run(kernel, dataclasses.replace(problem, v_scale=torch.ones(1))).out[0, 0].float()
    expected = bytes_.view(TORCH_DTYPES[kv_dtype]).float()
    finite = expected.isfinite()
    assert torch.equal(out[finite], expected[finite])
    assert not out[~finite].isfinite().any()  # slots past the end read the last key again, and 0 times infinity is NaN


@pytest.mark.parametrize("method", ["remat", "dump"])
def test_scales_of_an_8_bit_cache_reach_scores_softcap_and_sinks(method: str) -> None:
    heads = dataclasses.replace(SMALL, v_head_dim=48, softcap=2.0, sinks=True, window=30)
    spec = dataclasses.replace(verify_spec(heads, ScoreSpec()), kv_dtype="float8_e4m3")
    kernel = twin(spec, score_method=method)
    for layout in get_args(Layout):
        problem = attention_problem(spec, q_lens=[2, 1, 3], kv_lens=[150, 7, 1], page_size=16, seed=2, layout=layout)
        assert problem.k_scale is not None
        problem = dataclasses.replace(problem, v_scale=problem.k_scale.flip(0) * 3.0)
        result = verdict(kernel, problem)
        assert result.passed, (layout, result.detail)


def test_every_head_feature_at_once() -> None:
    heads = dataclasses.replace(SMALL, v_head_dim=48, window=20, softcap=8.0, sinks=True)
    kernel = twin(verify_spec(heads), split_keys=512, ctas_per_sm=1)
    problem = attention_problem(kernel.spec, q_lens=[3, 1, 2, 1], kv_lens=[1070, 64, 1, 0], page_size=16, seed=3)
    result = verdict(kernel, problem)
    assert result.passed, result.detail


@pytest.mark.parametrize("page_size", [1, 7, 64])
def test_every_page_size_and_layout(page_size: int) -> None:
    kernel = twin(verify_spec(SMALL, page_size=page_size))
    for layout in get_args(Layout):
        problem = attention_problem(
            kernel.spec, q_lens=[2, 1], kv_lens=[67, 64], page_size=page_size, seed=4, layout=layout
        )
        result = verdict(kernel, problem)
        assert result.passed, (layout, result.detail)


def test_drafting_equals_the_oracle() -> None:
    kernel = twin(sparse_spec(SMALL))
    for seed, layout in enumerate(get_args(Layout)):
        problem = attention_problem(
            kernel.spec, q_lens=Q_LENS, kv_lens=[300, *KV_LENS[1:]], page_size=16, seed=seed, layout=layout, budget=90
        )
        result = verdict(kernel, problem)
        assert result.passed, (layout, result.detail)


def test_every_head_feature_drafts_with_one_selection_a_layer() -> None:
    heads = dataclasses.replace(SMALL, v_head_dim=48, window=20, softcap=8.0, sinks=True)
    kernel = twin(sparse_spec(heads, "layer"), split_keys=512, ctas_per_sm=1)
    problem = attention_problem(
        kernel.spec, q_lens=[3, 1, 2, 1], kv_lens=[1070, 64, 1, 0], page_size=16, seed=6, budget=700
    )
    result = verdict(kernel, problem)
    assert result.passed, result.detail


def test_outputs_are_the_same_with_and_without_scores() -> None:
    plain, scored = verify_spec(SMALL), verify_spec(SMALL, ScoreSpec())
    problem = attention_problem(plain, q_lens=[3, 1], kv_lens=[200, 40], page_size=16, seed=5)
    without, having = run(twin(plain), problem), run(twin(scored), problem)
    assert torch.equal(without.out, having.out)
    assert torch.equal(without.lse, having.lse)


def test_c_has_no_bfloat16() -> None:
    spec = dataclasses.replace(verify_spec(SMALL), dtype="bfloat16")
    with pytest.raises(BuildError, match="render the plan for float16"):
        tilelang_twin.load(render(spec, plan_for(spec), "tilelang"), num_sms=1)
