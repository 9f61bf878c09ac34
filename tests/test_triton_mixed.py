"""Triton's mixed attention: each request of one launch verifies or drafts, as the two operations apart would."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from specattn_codegen import HeadConfig, space
from specattn_codegen.processors import gpus
from specattn_codegen.proof.check import check_attention
from specattn_codegen.proof.problems import AttentionProblem, attention_problem
from specattn_codegen.spec import Dtype, KernelSpec, KvDtype, ScoreHeads, ScoreSpec
from triton_cases import SMALL, attention_kernel, call_of, run, verdict

# No rows, no keys, padding, rows before every key, one key, several tiles and pages, lists that no share divides.
Q_LENS, KV_LENS = [3, 0, 1, 2, 1, 5, 2], [100, 40, 64, 1, -3, 233, 0]
EVERYTHING = dataclasses.replace(SMALL, v_head_dim=24, window=50, softcap=8.0, sinks=True)
SEVERAL_TILES = HeadConfig(num_q_heads=14, num_kv_heads=2, head_dim=16)


def mixed_spec(
    heads: HeadConfig = SMALL,
    score: ScoreSpec | None = None,
    selection: ScoreHeads = "kv_head",
    dtype: Dtype = "float16",
    kv_dtype: KvDtype | None = None,
) -> KernelSpec:
    return KernelSpec(
        op="mixed_attention",
        heads=heads,
        dtype=dtype,
        kv_dtype=kv_dtype,
        page_size=16,
        score=score,
        selection=selection,
    )


def ragged(spec: KernelSpec, modes: list[int], block: int = 1) -> AttentionProblem:
    problem = attention_problem(
        spec, q_lens=Q_LENS, kv_lens=KV_LENS, page_size=spec.page_size, seed=1, budget=40 // block, block=block
    )
    return dataclasses.replace(problem, mode=torch.tensor(modes, dtype=torch.int32))


@pytest.mark.parametrize("merge", ["separate", "fused"])
@pytest.mark.parametrize("modes", [[0, 1, 0, 1, 0, 1, 0], [1, 0, 1, 0, 1, 0, 1], [0] * 7, [1] * 7], ids=str)
def test_every_mix_equals_the_oracle(modes: list[int], merge: str) -> None:
    kernel = attention_kernel(mixed_spec(), merge=merge)
    result = verdict(kernel, ragged(kernel.spec, modes), num_sms=1 if merge == "fused" else 3)
    assert result.passed, result.detail


@pytest.mark.parametrize(
    ("spec", "method"),
    [
        (mixed_spec(score=ScoreSpec(rows="ends", heads="layer", histogram=True), selection="layer"), "remat"),
        (mixed_spec(SEVERAL_TILES, ScoreSpec(rows="last", granularity="page_max")), "dump"),
        (mixed_spec(EVERYTHING, ScoreSpec(histogram=True), "layer", "float32"), "dump"),
        (mixed_spec(score=ScoreSpec(normaliser="reference")), "fused"),
        (mixed_spec(SEVERAL_TILES, ScoreSpec(normaliser="reference", histogram=True)), "fused"),
        (mixed_spec(EVERYTHING, ScoreSpec(value="logit", heads="layer"), kv_dtype="float8_e5m2"), "fused"),
    ],
    ids=["remat", "dump", "everything", "reference", "several tiles", "float8"],
)
def test_scores_heads_and_caches_equal_the_oracle(spec: KernelSpec, method: str) -> None:
    kernel = attention_kernel(spec, score_method=method, block_n=16, merge="fused")
    result = verdict(kernel, ragged(spec, [0, 1, 0, 0, 1, 0, 1]), num_sms=2)
    assert result.passed, result.detail


def test_a_mixed_batch_is_the_two_operations_apart() -> None:
    """Rows within the tolerance of the operation they stand for, and scores of no request but those that verify."""
    spec = mixed_spec(score=ScoreSpec(normaliser="reference"))
    modes = [0, 1, 1, 0, 1, 0, 1]
    problem = ragged(spec, modes)
    fused, separate = (run(attention_kernel(spec, merge=merge), problem, num_sms=2) for merge in ("fused", "separate"))
    assert torch.equal(fused.out, separate.out)
    assert torch.equal(fused.lse, separate.lse)
    apart = dataclasses.replace(problem, mode=None)
    verified = run(attention_kernel(dataclasses.replace(spec, op="verify_attention", selection=None)), apart)
    drafted = run(attention_kernel(dataclasses.replace(spec, op="sparse_attention", score=None)), apart)
    drafts = torch.tensor(modes).repeat_interleave(torch.tensor(Q_LENS)).bool().to(fused.out.device)
    expected = torch.where(drafts[:, None, None], drafted.out, verified.out)
    torch.testing.assert_close(fused.out, expected, rtol=2**-9, atol=2**-9)
    torch.testing.assert_close(fused.lse, torch.where(drafts[:, None], drafted.lse, verified.lse))
    assert fused.scores is not None
    for request, mode in enumerate(modes):
        prefix = max(0, KV_LENS[request] - Q_LENS[request]) if Q_LENS[request] and not mode else 0
        assert fused.scores[request, :, prefix:].isnan().all()
        assert not fused.scores[request, :, :prefix].isnan().any()


def test_what_a_verifying_request_is_not_asked_is_not_read() -> None:
    """Its selection, counts and tail may hold anything; an index of the others names a block of keys."""
    spec = mixed_spec()
    problem = ragged(spec, [0, 1, 0, 1, 0, 1, 0], block=8)
    assert problem.indices is not None
    assert problem.counts is not None
    for tensor in (problem.indices, problem.counts, problem.tail_start):
        tensor[::2] = 2**31 - 1
    call = run(attention_kernel(spec, merge="fused"), problem)
    tidy = dataclasses.replace(problem, counts=problem.counts.clone(), tail_start=problem.tail_start.clone())
    assert tidy.counts is not None
    tidy.counts[::2] = 0
    tidy.tail_start[::2] = 0
    result = check_attention(spec, tidy, call.out, call.lse)
    assert result.passed, result.detail


def test_a_captured_launch_serves_other_modes() -> None:
    """The same workspace, counters and grid, whoever drafts: a replay finds what the launch before it left."""
    kernel = attention_kernel(mixed_spec(), merge="fused")
    first, other = (ragged(kernel.spec, modes) for modes in ([0, 1, 0, 1, 0, 1, 0], [1, 0, 1, 0, 1, 0, 1]))
    calls = [call_of(kernel.spec, problem) for problem in (first, other, first)]
    workspace = torch.full((kernel.workspace_bytes(calls[0]),), 0xFF, dtype=torch.uint8, device=calls[0].q.device)
    for call in calls:
        kernel.launch(call, workspace)
    assert torch.equal(calls[0].out, calls[2].out)
    result = check_attention(kernel.spec, other, calls[1].out, calls[1].lse)
    assert result.passed, result.detail
    (arrivals,) = kernel.arrivals.values()
    assert not arrivals.any()


def test_more_lists_than_are_scanned_at_a_time() -> None:
    spec = mixed_spec(HeadConfig(num_q_heads=1, num_kv_heads=1, head_dim=16))
    q_lens = [0, 1] + [0] * 250 + [1, 1, 0, 1, 1]
    lengths = [40] * (len(q_lens) - 2) + [70, 9]
    problem = attention_problem(spec, q_lens=q_lens, kv_lens=lengths, page_size=16, seed=3, budget=4)
    result = verdict(attention_kernel(spec, merge="fused"), problem, num_sms=1)
    assert result.passed, result.detail


def test_default_plans_are_one_launch_where_a_last_block_may_merge() -> None:
    spec = dataclasses.replace(mixed_spec(), dtype="bfloat16")
    for name in gpus.names():
        arch = gpus.find(name)
        plan = space.default_plan(spec, arch, "triton")
        assert space.why_invalid(plan, spec, arch) is None
        assert plan["merge"] == ("separate" if arch.vendor == "amd" else "fused")


def test_a_tuned_plan_of_verification_serves_mixed_batches() -> None:
    spec, h100 = dataclasses.replace(mixed_spec(), dtype="bfloat16"), gpus.find("h100")
    verify = dataclasses.replace(spec, op="verify_attention", selection=None)
    tuned = space.default_plan(verify, h100, "triton").replace(num_stages=2, split_keys=512, ctas_per_sm=1)
    adapted = space.for_mixed(tuned, spec, h100)
    assert adapted["num_stages"] == 2
    assert space.why_invalid(adapted, spec, h100) is None
    assert "split_keys=512 is not one of 0" in (space.why_invalid(tuned, spec, h100) or "")
    tilelang = space.default_plan(dataclasses.replace(verify, score=None), h100, "tilelang")
    assert space.for_mixed(tilelang, spec, h100) == space.default_plan(spec, h100, "triton")
