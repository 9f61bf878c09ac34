"""TileLang's templates against the float64 oracle, by the same rendered text through TileLang's C target."""

from __future__ import annotations

import dataclasses
from typing import get_args

import pytest
import torch

from specattn_codegen.errors import BuildError
from specattn_codegen.heads import HeadConfig
from specattn_codegen.plan import Setting
from specattn_codegen.problems import Layout, attention_problem
from specattn_codegen.render import render
from specattn_codegen.spec import ScoreSpec

pytest.importorskip("tilelang", reason="TileLang is not installed")

from specattn_codegen.build import tilelang_twin
from tilelang_cases import SMALL, plan_for, run, sparse_spec, twin, verdict, verify_spec

# No rows, no keys, padding, rows before every key, one key, several tiles and pages, a tile that ends on a page.
Q_LENS, KV_LENS = [3, 0, 1, 2, 1, 5, 2], [100, 40, 64, 1, -3, 33, 0]
ODD = HeadConfig(num_q_heads=6, num_kv_heads=2, head_dim=48, v_head_dim=80, scale=0.3)
WINDOWED = dataclasses.replace(SMALL, window=37)

SCORED: dict[str, tuple[HeadConfig, ScoreSpec, dict[str, Setting]]] = {
    "pillar": (SMALL, ScoreSpec(), {}),
    "vegas": (SMALL, ScoreSpec(rows="ends", heads="layer"), {}),
    "last, fixed splits": (ODD, ScoreSpec(rows="last"), {"split_keys": 512, "ctas_per_sm": 1}),
    "weights of a window": (WINDOWED, ScoreSpec(heads="layer"), {"block_m": 32}),
    "reference": (ODD, ScoreSpec(normaliser="reference"), {}),
    "reference of a layer": (WINDOWED, ScoreSpec(rows="ends", heads="layer", normaliser="reference"), {}),
    "logits": (dataclasses.replace(SMALL, softcap=2.5), ScoreSpec(value="logit"), {}),
    "logits of a window": (WINDOWED, ScoreSpec(rows="ends", heads="layer", value="logit"), {"block_n": 64}),
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
