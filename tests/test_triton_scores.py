"""Every definition of a score that Triton's verification serves, by each way to make it, against the float64 oracle."""

from __future__ import annotations

import dataclasses
import itertools
from typing import get_args

import pytest
import torch

from specattn_codegen.heads import HeadConfig
from specattn_codegen.proof.check import check_attention
from specattn_codegen.proof.problems import AttentionProblem, attention_problem
from specattn_codegen.space.triton import score_methods
from specattn_codegen.spec import KernelSpec, ScoreGranularity, ScoreHeads, ScoreRows, ScoreSpec
from triton_cases import SMALL, attention_kernel, call_of, run, verdict, verify_spec

# Several tiles and pages, no rows, padding, rows before every key.
Q_LENS, KV_LENS = [3, 0, 1, 2], [70, 40, -3, 1]

VALUES = {
    "weight": ScoreSpec(),
    "logit": ScoreSpec(value="logit"),
    "reference": ScoreSpec(normaliser="reference"),
}
METHODS = [(name, method) for name, score in VALUES.items() for method in score_methods(score)]
GRANULARITIES: tuple[ScoreGranularity, ...] = get_args(ScoreGranularity)
# Every pair of rows, heads and method, with the granularities in turn.
DEFINITIONS = [
    (rows, heads, name, method, GRANULARITIES[place % len(GRANULARITIES)])
    for place, (rows, heads, (name, method)) in enumerate(
        itertools.product(get_args(ScoreRows), get_args(ScoreHeads), METHODS)
    )
]


def ragged(spec: KernelSpec, seed: int, magnitude: float = 3.0) -> AttentionProblem:
    return attention_problem(
        spec, q_lens=Q_LENS, kv_lens=KV_LENS, page_size=spec.page_size, seed=seed, magnitude=magnitude
    )


@pytest.mark.triton_sample
@pytest.mark.parametrize(("rows", "heads", "value", "method", "granularity"), DEFINITIONS)
def test_scores_equal_the_oracle(
    rows: ScoreRows, heads: ScoreHeads, value: str, method: str, granularity: ScoreGranularity
) -> None:
    score = dataclasses.replace(VALUES[value], rows=rows, heads=heads, granularity=granularity)
    kernel = attention_kernel(verify_spec(SMALL, score), score_method=method)
    result = verdict(kernel, ragged(kernel.spec, seed=1))
    assert result.passed, result.detail


@pytest.mark.parametrize(("value", "method"), METHODS)
@pytest.mark.parametrize(("window", "rows"), [(1, "all"), (37, "ends"), (37, "last")])
def test_keys_outside_a_window_count_as_the_definition_says(
    window: int, rows: ScoreRows, value: str, method: str
) -> None:
    """Keys that no row sees, that some rows see, and tiles that no block reads."""
    heads = HeadConfig(num_q_heads=3, num_kv_heads=1, head_dim=16, window=window, softcap=4.0)
    score = dataclasses.replace(VALUES[value], rows=rows, granularity="page_mean" if rows == "ends" else "token")
    kernel = attention_kernel(verify_spec(heads, score, "float32"), score_method=method, block_n=16)
    result = verdict(kernel, ragged(kernel.spec, seed=2))
    assert result.passed, result.detail


@pytest.mark.parametrize(("value", "method"), METHODS)
@pytest.mark.parametrize(
    ("page_size", "granularity"), [(1, "page_max"), (7, "page_mean"), (64, "page_max"), (100, "page_mean")]
)
def test_pages_of_any_size_are_pooled(page_size: int, granularity: ScoreGranularity, value: str, method: str) -> None:
    """Pages of one key, padded to a power of two, and of more keys than a block scores at a time."""
    heads = HeadConfig(num_q_heads=2, num_kv_heads=1, head_dim=16)
    score = dataclasses.replace(VALUES[value], granularity=granularity)
    kernel = attention_kernel(verify_spec(heads, score, page_size=page_size), score_method=method)
    problem = attention_problem(kernel.spec, q_lens=[2, 1], kv_lens=[135, 102], page_size=page_size, seed=3)
    result = verdict(kernel, problem)
    assert result.passed, result.detail


@pytest.mark.parametrize(
    ("value", "method", "heads"),
    [(*method, get_args(ScoreHeads)[place % 2]) for place, method in enumerate(METHODS)]
    + [("reference", "fused", "layer")],
)
def test_rows_of_several_tiles_add_up(value: str, method: str, heads: ScoreHeads) -> None:
    """3 heads and 9 rows in tiles of 16 packed rows; the other request has one tile of them."""
    config = HeadConfig(num_q_heads=6, num_kv_heads=2, head_dim=16)
    kernel = attention_kernel(verify_spec(config, dataclasses.replace(VALUES[value], heads=heads)), score_method=method)
    problem = attention_problem(kernel.spec, q_lens=[9, 1], kv_lens=[45, 40], page_size=16, seed=4)
    first, second = run(kernel, problem), run(kernel, problem)
    assert first.scores is not None
    assert second.scores is not None
    result = check_attention(kernel.spec, problem, first.out, first.lse, first.scores)
    assert result.passed, result.detail
    assert torch.equal(first.scores.nan_to_num(-1), second.scores.nan_to_num(-1))


@pytest.mark.parametrize(
    ("score", "method"),
    [
        (ScoreSpec(histogram=True), "remat"),
        (ScoreSpec(histogram=True, heads="layer", rows="ends"), "dump"),
        (ScoreSpec(histogram=True, granularity="page_max"), "dump"),
        (ScoreSpec(histogram=True, normaliser="reference"), "fused"),
        (ScoreSpec(histogram=True, normaliser="reference", heads="layer", granularity="page_mean"), "fused"),
    ],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_histograms_count_what_was_written(score: ScoreSpec, method: str) -> None:
    """Exactly, also of requests without a score, and the same again when the launch finds old counts."""
    kernel = attention_kernel(verify_spec(SMALL, score), score_method=method)
    problem = ragged(kernel.spec, seed=5)
    result = verdict(kernel, problem)
    assert result.passed, result.detail
    call = call_of(kernel.spec, problem)
    assert call.histogram is not None
    workspace = torch.zeros(kernel.workspace_bytes(call), dtype=torch.uint8, device=call.q.device)
    kernel.launch(call, workspace)
    first = call.histogram.clone()
    kernel.launch(call, workspace)
    assert torch.equal(first, call.histogram)
    assert first.sum() > 0


@pytest.mark.parametrize("far", [-60.0, 60.0])
def test_a_reference_far_from_the_rows_saturates_or_vanishes(far: float) -> None:
    spec = verify_spec(SMALL, ScoreSpec(normaliser="reference"), "float32")
    kernel = attention_kernel(spec)
    problem = attention_problem(spec, q_lens=[2], kv_lens=[40], page_size=16, seed=6)
    assert problem.lse_ref is not None
    problem = dataclasses.replace(problem, lse_ref=torch.full_like(problem.lse_ref, far))
    scores = run(kernel, problem).scores
    assert scores is not None
    written = scores[0, :, :38]
    if far > 0:
        assert verdict(kernel, problem).passed
    else:  # each of 4 rows and heads weighs at most 2^64, and the row's own largest weight reaches that
        assert bool((written <= 2.0**64).all())
        assert bool((written.amax(dim=-1) > 2.0**62).all())


@pytest.mark.parametrize(("value", "method"), [("weight", "dump"), ("logit", "fused"), ("reference", "fused")])
def test_outputs_do_not_depend_on_scoring(value: str, method: str) -> None:
    plain = attention_kernel(verify_spec(SMALL))
    scoring = attention_kernel(verify_spec(SMALL, VALUES[value]), score_method=method)
    problem = ragged(scoring.spec, seed=7)
    without, scored = run(plain, problem), run(scoring, problem)
    assert torch.equal(without.out, scored.out)
    assert torch.equal(without.lse, scored.lse)


@pytest.mark.parametrize(("value", "method"), METHODS)
def test_columns_past_the_prefix_are_not_written(value: str, method: str) -> None:
    score = dataclasses.replace(VALUES[value], granularity="page_max" if method == "dump" else "token")
    kernel = attention_kernel(verify_spec(SMALL, score), score_method=method)
    scores = run(kernel, ragged(kernel.spec, seed=8)).scores
    assert scores is not None
    for request, (rows, keys) in enumerate(zip(Q_LENS, KV_LENS, strict=True)):
        written = score.columns(max(0, keys - rows) if rows else 0, 16)
        assert scores[request, :, written:].isnan().all()
        assert not scores[request, :, :written].isnan().any()
