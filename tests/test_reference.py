"""The oracle itself, against torch's own attention and against closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from specattn_codegen.heads import HeadConfig
from specattn_codegen.policy import TopK
from specattn_codegen.proof import reference
from specattn_codegen.proof.problems import AttentionProblem, attention_problem
from specattn_codegen.results import Selection, VerifyOutput
from specattn_codegen.spec import KernelSpec, ScoreSpec

HEADS = HeadConfig(num_q_heads=6, num_kv_heads=2, head_dim=16)
SPEC = KernelSpec(op="verify_attention", heads=HEADS)
SPARSE = KernelSpec(op="sparse_attention", heads=HEADS, selection="kv_head")


def verify(problem: AttentionProblem, score: ScoreSpec | None = None) -> VerifyOutput:
    p = problem
    return reference.verify_attention(
        *(p.q, p.k_cache, p.v_cache, p.page_table, p.kv_lens, p.cu_q),
        heads=HEADS,
        score=score,
        max_kv=p.max_kv,
        sinks=p.sinks,
    )


def live_keys(problem: AttentionProblem, request: int, cache: torch.Tensor) -> torch.Tensor:
    """[kv_len, Hq, D] of one request, read page by page."""
    length, page_size = int(problem.kv_lens[request]), cache.shape[1]
    pages = problem.page_table[request, : -(-length // page_size)].long()
    return cache[pages].flatten(0, 1)[:length].double().repeat_interleave(HEADS.group, dim=1)


def test_verification_equals_torch_attention() -> None:
    problem = attention_problem(SPEC, q_lens=[4, 1], kv_lens=[50, 23], page_size=8, seed=0)
    result = verify(problem)
    for request in range(2):
        rows = slice(int(problem.cu_q[request]), int(problem.cu_q[request + 1]))
        q = problem.q[rows].double().transpose(0, 1)
        k, v = (live_keys(problem, request, c).transpose(0, 1) for c in (problem.k_cache, problem.v_cache))
        seen = torch.ones(q.shape[1], k.shape[1]).tril(k.shape[1] - q.shape[1]).bool()
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        torch.testing.assert_close(result.out[rows], expected.transpose(0, 1))


def test_lse_is_the_log_of_the_sum_of_exponentials() -> None:
    problem = attention_problem(SPEC, q_lens=[1], kv_lens=[30], page_size=4, seed=1)
    logits = torch.einsum("hd,nhd->hn", problem.q[0].double(), live_keys(problem, 0, problem.k_cache)) * HEADS.scale
    torch.testing.assert_close(verify(problem).lse[0], logits.exp().sum(1).log())


@pytest.mark.parametrize("heads", ["kv_head", "layer"])
def test_scores_of_one_row_are_its_mean_softmax_weights(heads: str) -> None:
    problem = attention_problem(SPEC, q_lens=[1], kv_lens=[30], page_size=4, seed=2)
    score = ScoreSpec(rows="ends", heads=heads)  # pyright: ignore[reportArgumentType]
    logits = torch.einsum("hd,nhd->hn", problem.q[0].double(), live_keys(problem, 0, problem.k_cache)) * HEADS.scale
    weights = logits.softmax(1)[:, :29]
    expected = weights.view(2, 3, 29).mean(1) if heads == "kv_head" else weights.mean(0, keepdim=True)
    scores = verify(problem, score).scores
    assert scores is not None
    torch.testing.assert_close(scores[0, :, :29], expected)
    assert scores[0, :, 29:].isnan().all()


def test_ends_average_the_first_and_last_row_only() -> None:
    problem = attention_problem(SPEC, q_lens=[5], kv_lens=[40], page_size=4, seed=3)
    changed = problem.q.clone()
    changed[1:4] += 1.0
    moved = AttentionProblem(**{**{f: getattr(problem, f) for f in problem.__slots__}, "q": changed})
    ends, moved_ends = (verify(p, ScoreSpec(rows="ends")).scores for p in (problem, moved))
    every, moved_every = (verify(p, ScoreSpec(rows="all")).scores for p in (problem, moved))
    assert ends is not None
    assert moved_ends is not None
    assert every is not None
    assert moved_every is not None
    assert torch.equal(ends[..., :35], moved_ends[..., :35])
    assert not torch.equal(every[..., :35], moved_every[..., :35])


def test_everything_selected_is_verification() -> None:
    problem = attention_problem(SPARSE, q_lens=[3, 2], kv_lens=[60, 9], page_size=8, seed=4, budget=100)
    p = problem
    assert p.indices is not None
    assert p.counts is not None
    sparse = reference.sparse_attention(
        *(p.q, p.k_cache, p.v_cache, p.page_table, p.kv_lens, p.cu_q),
        Selection(p.indices, p.counts),
        p.tail_start,
        heads=HEADS,
    )
    dense = verify(problem)
    torch.testing.assert_close(sparse.out, dense.out)
    torch.testing.assert_close(sparse.lse, dense.lse)


def test_a_row_before_every_key_sees_nothing_even_with_a_sink() -> None:
    heads = HeadConfig(num_q_heads=2, num_kv_heads=1, head_dim=4, sinks=True)
    spec = KernelSpec(op="verify_attention", heads=heads)
    p = attention_problem(spec, q_lens=[3], kv_lens=[1], page_size=4, seed=5)
    result = reference.verify_attention(
        *(p.q, p.k_cache, p.v_cache, p.page_table, p.kv_lens, p.cu_q), heads=heads, sinks=p.sinks
    )
    assert (result.out[:2] == 0).all()
    assert (result.lse[:2] == -math.inf).all()
    assert result.lse[2].isfinite().all()


def test_a_sink_takes_mass_and_gives_no_value() -> None:
    heads = HeadConfig(num_q_heads=1, num_kv_heads=1, head_dim=4, sinks=True)
    spec = KernelSpec(op="verify_attention", heads=heads)
    p = attention_problem(spec, q_lens=[1], kv_lens=[1], page_size=4, seed=6)
    args = (p.q, p.k_cache, p.v_cache, p.page_table, p.kv_lens, p.cu_q)
    equal_sink = torch.full(
        (1,), float(p.q[0, 0].double() @ p.k_cache[p.page_table[0, 0], 0, 0].double()) * heads.scale
    )
    result = reference.verify_attention(*args, heads=heads, sinks=equal_sink)
    torch.testing.assert_close(result.out[0, 0], p.v_cache[p.page_table[0, 0], 0, 0].double() / 2)


def test_selection_forces_sinks_and_recents_inside_the_budget() -> None:
    scores = torch.tensor([[[0.0, 9.0, 0.0, 7.0, 8.0, 0.0, math.nan]]])
    prefix = torch.tensor([6], dtype=torch.int32)
    chosen = reference.select_kv(scores, prefix, TopK(k=4), sink=1, recent=1)
    assert chosen.indices.tolist() == [[[0, 1, 4, 5]]]
    forced = reference.select_kv(scores, prefix, TopK(k=1), sink=2, recent=2)
    assert forced.indices.tolist() == [[[0, 1, 4, 5]]]
    everything = reference.select_kv(scores, prefix, TopK(k=6))
    assert everything.indices.tolist() == [[[0, 1, 2, 3, 4, 5]]]
