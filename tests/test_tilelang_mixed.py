"""TileLang's mixed attention against the float64 oracle, by the same rendered text through TileLang's C target."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from specattn_codegen.heads import HeadConfig
from specattn_codegen.proof.check import check_attention
from specattn_codegen.proof.problems import AttentionProblem, attention_problem
from specattn_codegen.spec import KernelSpec, ScoreHeads, ScoreSpec

pytest.importorskip("tilelang", reason="TileLang is not installed")

from tilelang_cases import SMALL, mixed_spec, run, sparse_spec, twin, verdict, verify_spec

# No rows, no keys, padding, rows before every key, one key, several tiles and pages, lists that no share divides.
Q_LENS, KV_LENS = [3, 0, 1, 2, 1, 5, 2], [100, 40, 64, 1, -3, 433, 0]
EVERYTHING = dataclasses.replace(SMALL, v_head_dim=48, window=50, softcap=8.0, sinks=True)
SEVERAL_TILES = HeadConfig(num_q_heads=14, num_kv_heads=2, head_dim=32)


def ragged(spec: KernelSpec, modes: list[int], block: int = 1) -> AttentionProblem:
    problem = attention_problem(
        spec, q_lens=Q_LENS, kv_lens=KV_LENS, page_size=spec.page_size, seed=1, budget=40 // block, block=block
    )
    return dataclasses.replace(problem, mode=torch.tensor(modes, dtype=torch.int32))


def test_every_mix_equals_the_oracle() -> None:
    kernel = twin(mixed_spec(SMALL))
    for modes in ([0, 1, 0, 1, 0, 1, 0], [1, 0, 1, 0, 1, 0, 1], [0] * 7, [1] * 7):
        for num_sms in (1, 3):
            result = verdict(dataclasses.replace(kernel, num_sms=num_sms), ragged(kernel.spec, modes))
            assert result.passed, (modes, num_sms, result.detail)


@pytest.mark.parametrize(
    ("heads", "score", "selection"),
    [
        (SMALL, ScoreSpec(rows="ends", heads="layer"), "layer"),
        (SEVERAL_TILES, ScoreSpec(), "kv_head"),
        (SEVERAL_TILES, ScoreSpec(normaliser="reference"), "kv_head"),
        (EVERYTHING, ScoreSpec(rows="last"), "layer"),
        (EVERYTHING, ScoreSpec(value="logit", heads="layer"), "kv_head"),
        (SMALL, ScoreSpec(granularity="page_max", histogram=True), "kv_head"),
    ],
    ids=["vegas", "several tiles", "reference", "everything", "logits", "pages"],
)
def test_scores_and_heads_equal_the_oracle(heads: HeadConfig, score: ScoreSpec, selection: ScoreHeads) -> None:
    kernel = twin(mixed_spec(heads, score, selection), ctas_per_sm=2)
    result = verdict(kernel, ragged(kernel.spec, [0, 1, 0, 0, 1, 0, 1]))
    assert result.passed, result.detail


def test_8_bit_caches_and_kept_weights_equal_the_oracle() -> None:
    """Scales reach what one program writes, what several leave to be merged, and scores."""
    spec = dataclasses.replace(mixed_spec(EVERYTHING, ScoreSpec(rows="ends")), kv_dtype="float8_e5m2")
    kernel = twin(spec, ctas_per_sm=2, score_method="dump")
    result = verdict(kernel, ragged(spec, [0, 1, 0, 0, 1, 0, 1]))
    assert result.passed, result.detail


def test_a_mixed_batch_is_the_two_operations_apart() -> None:
    """Rows within the tolerance of the operation they stand for, and scores of no request but those that verify."""
    spec = mixed_spec(SMALL, ScoreSpec(normaliser="reference"))
    modes = [0, 1, 1, 0, 1, 0, 1]
    problem = ragged(spec, modes)
    mixed = run(twin(spec), problem)
    apart = dataclasses.replace(problem, mode=None)
    verified, drafted = run(twin(verify_spec(SMALL)), apart), run(twin(sparse_spec(SMALL)), apart)
    drafts = torch.tensor(modes).repeat_interleave(torch.tensor(Q_LENS)).bool()
    expected = torch.where(drafts[:, None, None], drafted.out, verified.out)
    torch.testing.assert_close(mixed.out, expected, rtol=2**-9, atol=2**-9)
    torch.testing.assert_close(mixed.lse, torch.where(drafts[:, None], drafted.lse, verified.lse))
    assert mixed.scores is not None
    for request, mode in enumerate(modes):
        prefix = max(0, KV_LENS[request] - Q_LENS[request]) if Q_LENS[request] and not mode else 0
        assert mixed.scores[request, :, prefix:].isnan().all()
        assert not mixed.scores[request, :, :prefix].isnan().any()


def test_what_a_verifying_request_is_not_asked_is_not_read() -> None:
    """Its selection, counts and tail may hold anything; an index of the others names a block of keys."""
    kernel = twin(mixed_spec(SMALL))
    problem = ragged(kernel.spec, [0, 1, 0, 1, 0, 1, 0], block=8)
    assert problem.indices is not None
    assert problem.counts is not None
    for tensor in (problem.indices, problem.counts, problem.tail_start):
        tensor[::2] = 2**31 - 1
    call = run(kernel, problem)
    tidy = dataclasses.replace(problem, counts=problem.counts.clone(), tail_start=problem.tail_start.clone())
    assert tidy.counts is not None
    tidy.counts[::2] = 0
    tidy.tail_start[::2] = 0
    result = check_attention(kernel.spec, tidy, call.out, call.lse)
    assert result.passed, result.detail


def test_more_requests_than_are_scanned_at_a_time() -> None:
    spec = mixed_spec(HeadConfig(num_q_heads=1, num_kv_heads=1, head_dim=32))
    q_lens = [0, 1] + [0] * 250 + [1, 1, 0, 1, 1]
    lengths = [40] * (len(q_lens) - 2) + [170, 9]
    problem = attention_problem(spec, q_lens=q_lens, kv_lens=lengths, page_size=16, seed=3, budget=4)
    result = verdict(twin(spec, ctas_per_sm=1), problem)
    assert result.passed, result.detail
