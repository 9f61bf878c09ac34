"""Splits of a fixed length: a row's results are the same to the last bit, whatever else is in the call."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from specattn_codegen import space
from specattn_codegen.heads import HeadConfig
from specattn_codegen.kernel import AttentionCall
from specattn_codegen.plan import Setting
from specattn_codegen.processors import gpus
from specattn_codegen.proof.check import check_attention
from specattn_codegen.proof.problems import AttentionProblem, attention_problem
from specattn_codegen.spec import KernelSpec, ScoreSpec
from triton_cases import SMALL, attention_kernel, run, sparse_spec, verify_spec

SPLIT = 64
HEADS = {
    "plain": SMALL,
    "window": dataclasses.replace(SMALL, window=70),
    "several tiles of rows": HeadConfig(num_q_heads=10, num_kv_heads=2, head_dim=16),
}


def alone(problem: AttentionProblem, request: int, rows: slice) -> AttentionProblem:
    """One request of a problem with some of its last rows, in a call of its own and with tighter bounds."""
    start, end = (int(problem.cu_q[request + place]) for place in (0, 1))
    row_indices = torch.arange(start, end)[rows]
    pages = -(-int(problem.kv_lens[request]) // problem.k_cache.shape[1])
    return dataclasses.replace(
        problem,
        q=problem.q[row_indices],
        lse_ref=None if problem.lse_ref is None else problem.lse_ref[row_indices].contiguous(),
        page_table=problem.page_table[request : request + 1, :pages],
        kv_lens=problem.kv_lens[request : request + 1],
        cu_q=torch.tensor([0, len(row_indices)], dtype=torch.int32),
        max_q=len(row_indices),
        max_kv=pages * problem.k_cache.shape[1],
        indices=None if problem.indices is None else problem.indices[request : request + 1],
        counts=None if problem.counts is None else problem.counts[request : request + 1],
        tail_start=problem.tail_start[request : request + 1],
    )


def run_both(spec: KernelSpec, rows: slice, **changes: Setting) -> tuple[AttentionCall, AttentionCall]:
    """Request 1 among others, on a large device, and on its own on a small one."""
    kernel = attention_kernel(spec, split_keys=SPLIT, ctas_per_sm=1, **changes)
    problem = attention_problem(spec, q_lens=[2, 4, 1], kv_lens=[30, 200, 330], page_size=16, seed=1, budget=90)
    among = run(kernel, problem, num_sms=100)
    result = check_attention(spec, problem, among.out, among.lse, among.scores)
    assert result.passed, result.detail
    return among, run(kernel, alone(problem, 1, rows), num_sms=1)


@pytest.mark.parametrize(
    ("name", "rows"), [("plain", slice(None)), ("window", slice(3, None)), ("several tiles of rows", slice(3, None))]
)
def test_neighbours_and_bounds_do_not_matter(name: str, rows: slice) -> None:
    """Neither other requests nor other rows of the same one, so that verifying a draft cannot change its logits."""
    for spec in (verify_spec(HEADS[name]), sparse_spec(HEADS[name])):
        among, single = run_both(spec, rows)
        assert torch.equal(among.out[2:6][rows], single.out), spec.op
        assert torch.equal(among.lse[2:6][rows], single.lse), spec.op


@pytest.mark.parametrize(
    ("score", "method"),
    [(ScoreSpec(), "dump"), (ScoreSpec(normaliser="reference"), "fused"), (ScoreSpec(value="logit"), "fused")],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_scores_do_not_depend_on_neighbours(score: ScoreSpec, method: str) -> None:
    among, single = run_both(verify_spec(SMALL, score), slice(None), score_method=method)
    assert among.scores is not None
    assert single.scores is not None
    assert torch.equal(among.scores[1, :, :196], single.scores[0, :, :196])


def test_more_selected_numbers_than_keys_go_to_the_last_split() -> None:
    """A list with repeats is longer than any grid of its keys; each repeat counts again."""
    spec = sparse_spec(SMALL, "layer", "float32")
    kernel = attention_kernel(spec, split_keys=SPLIT, ctas_per_sm=1)
    problem = attention_problem(spec, q_lens=[1], kv_lens=[60], page_size=16, seed=2, budget=300)
    assert problem.indices is not None
    assert problem.counts is not None
    problem.indices[:] = -1
    problem.indices[:, :, 295:] = torch.arange(5, dtype=torch.int32)
    problem.counts[:] = 300
    call = run(kernel, problem)
    tidy = dataclasses.replace(problem, indices=problem.indices[:, :, 295:].contiguous(), counts=problem.counts * 0 + 5)
    result = check_attention(spec, tidy, call.out, call.lse)
    assert result.passed, result.detail


@pytest.mark.parametrize("gpu", ["a100", "h100", "mi300x"])
def test_any_plan_has_a_batch_invariant_one(gpu: str) -> None:
    arch = gpus.find(gpu)
    for spec in (
        KernelSpec(op="verify_attention", heads=SMALL, dtype="bfloat16", page_size=16, score=ScoreSpec()),
        KernelSpec(op="sparse_attention", heads=SMALL, dtype="bfloat16", page_size=16, selection="layer"),
        KernelSpec(op="select_kv", heads=SMALL, selection="layer"),
    ):
        plan = space.batch_invariant(space.default_plan(spec, arch, "triton"))
        assert space.why_invalid(plan, spec, arch) is None
