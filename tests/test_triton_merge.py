"""The last block of a tile merges its splits: the same bits as a kernel of its own gives, launch after launch."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from specattn_codegen import space
from specattn_codegen.heads import HeadConfig
from specattn_codegen.kernel import AttentionCall
from specattn_codegen.processors import gpus
from specattn_codegen.proof.check import check_attention
from specattn_codegen.proof.problems import attention_problem
from specattn_codegen.spec import KernelSpec, ScoreSpec
from triton_cases import SMALL, attention_kernel, call_of, run, verify_spec

# One key, no keys, no rows, padding, a single tile, and lengths that divide into no grid.
Q_LENS, KV_LENS = [1, 2, 0, 1, 3, 2], [1, 0, 40, -3, 32, 211]
EVERYTHING = HeadConfig(num_q_heads=4, num_kv_heads=2, head_dim=32, v_head_dim=24, window=50, softcap=8.0, sinks=True)
SPECS: dict[str, tuple[KernelSpec, dict[str, str | int]]] = {
    "plain": (verify_spec(SMALL), {}),
    "everything": (verify_spec(EVERYTHING, dtype="float32"), {}),
    "several tiles of rows": (verify_spec(HeadConfig(num_q_heads=7, num_kv_heads=1, head_dim=16)), {}),
    "float8": (verify_spec(dataclasses.replace(SMALL, sinks=True), kv_dtype="float8_e5m2"), {}),
    "remat": (verify_spec(SMALL, ScoreSpec(rows="ends", histogram=True)), {"score_method": "remat"}),
    "dump": (verify_spec(SMALL, ScoreSpec(heads="layer", histogram=True)), {"score_method": "dump"}),
    "reference": (verify_spec(SMALL, ScoreSpec(normaliser="reference")), {}),
    "descriptors": (verify_spec(SMALL), {"kv_load": "descriptor", "block_n": 16}),
}


def _same_bits(one: AttentionCall, other: AttentionCall) -> bool:
    pairs = [(one.out, other.out), (one.lse, other.lse), (one.scores, other.scores), (one.histogram, other.histogram)]
    return all(
        a is b is None or (a is not None and b is not None and torch.equal(a.nan_to_num(-1), b.nan_to_num(-1)))
        for a, b in pairs
    )


@pytest.mark.parametrize("name", SPECS)
def test_the_last_block_gives_the_bits_of_a_kernel_of_its_own(name: str) -> None:
    """With a split for each tile of keys, and where every request has one or two."""
    spec, changes = SPECS[name]
    separate, fused = (attention_kernel(spec, merge=merge, **changes) for merge in ("separate", "fused"))
    problem = attention_problem(spec, q_lens=Q_LENS, kv_lens=KV_LENS, page_size=16, seed=1)
    for num_sms in (1, 100):
        apart, together = run(separate, problem, num_sms), run(fused, problem, num_sms)
        assert _same_bits(apart, together), num_sms
    result = check_attention(spec, problem, together.out, together.lse, together.scores, histogram=together.histogram)
    assert result.passed, result.detail


def test_a_launch_leaves_its_counters_as_it_found_them() -> None:
    """So that a captured launch may be replayed: with the same workspace, other lengths and other rows."""
    kernel = attention_kernel(verify_spec(SMALL), merge="fused")
    problem = attention_problem(kernel.spec, q_lens=[3, 1], kv_lens=[90, 140], page_size=16, seed=2)
    first = call_of(kernel.spec, problem)
    shorter = dataclasses.replace(problem, kv_lens=torch.tensor([33, 0], dtype=torch.int32))
    other = call_of(kernel.spec, shorter)
    workspace = torch.full((kernel.workspace_bytes(first),), 0xFF, dtype=torch.uint8, device=first.q.device)
    kernel.launch(first, workspace)
    expected = first.out.clone()
    kernel.launch(other, workspace)
    result = check_attention(kernel.spec, shorter, other.out, other.lse)
    assert result.passed, result.detail
    first.out.fill_(float("nan"))
    kernel.launch(first, workspace)
    assert torch.equal(first.out, expected)
    (arrivals,) = kernel.arrivals.values()
    assert not arrivals.any()


def test_a_plan_for_several_streams_or_any_company_merges_apart() -> None:
    spec = KernelSpec(op="verify_attention", heads=SMALL, dtype="bfloat16", page_size=16)
    plan = space.default_plan(spec, gpus.find("h100"), "triton").replace(merge="fused")
    assert space.why_invalid(plan, spec, gpus.find("h100")) is None
    assert space.reentrant(plan) == plan.replace(merge="separate")
    assert space.batch_invariant(plan)["merge"] == "separate"
