"""The CPU's mixed attention: each request of one launch verifies or drafts, as the two operations apart would."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from cases import RAGGED, run, verdict
from specattn_codegen import HeadConfig, SpecError
from specattn_codegen.proof.problems import attention_problem
from specattn_codegen.results import Selection
from specattn_codegen.spec import Dtype, KernelSpec, KvDtype, ScoreHeads, ScoreSpec
from specattn_runtime import load_kernels
from test_cpu_attention import ODD_HEADS, SMALL, kernel_for

SCORES = [None, ScoreSpec(), ScoreSpec(rows="ends", heads="layer", histogram=True), ScoreSpec(normaliser="reference")]


def mixed_spec(
    heads: HeadConfig = SMALL,
    dtype: Dtype = "float32",
    selection: ScoreHeads = "kv_head",
    score: ScoreSpec | None = None,
    kv_dtype: KvDtype | None = None,
) -> KernelSpec:
    return KernelSpec(
        op="mixed_attention", heads=heads, dtype=dtype, kv_dtype=kv_dtype, selection=selection, score=score
    )


@pytest.mark.parametrize("selection", ["kv_head", "layer"])
@pytest.mark.parametrize("score", SCORES, ids=lambda score: score.name if score else "none")
def test_mixed_batches_equal_the_oracle(score: ScoreSpec | None, selection: ScoreHeads) -> None:
    kernel = kernel_for(mixed_spec(score=score, selection=selection))
    for seed, (q_lens, kv_lens, page_size) in enumerate(RAGGED):
        for modes in ([0, 1] * 3, [1, 0] * 3, [1] * 6, [0] * 6):
            problem = attention_problem(
                kernel.spec, q_lens=q_lens, kv_lens=kv_lens, page_size=page_size, seed=seed, budget=60
            )
            problem = dataclasses.replace(problem, mode=torch.tensor(modes[: len(q_lens)], dtype=torch.int32))
            result = verdict(kernel, problem)
            assert result.passed, (modes, kv_lens, result.detail)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("kv_dtype", [None, "float8_e4m3"])
def test_dtypes_windows_softcap_and_sinks(dtype: Dtype, kv_dtype: KvDtype | None) -> None:
    heads = ODD_HEADS["all of them, Dv != D"]
    kernel = kernel_for(mixed_spec(heads, dtype, "kv_head", ScoreSpec(value="logit", heads="layer"), kv_dtype))
    for q_lens, kv_lens, page_size in RAGGED:
        problem = attention_problem(
            kernel.spec, q_lens=q_lens, kv_lens=kv_lens, page_size=page_size, seed=3, budget=20, block=4
        )
        result = verdict(kernel, problem)
        assert result.passed, result.detail


@pytest.mark.parametrize("heads_per_task", ["one", "all"])
def test_a_mixed_batch_gives_the_bits_of_the_two_operations_apart(heads_per_task: str) -> None:
    mixed = kernel_for(mixed_spec(score=ScoreSpec()), changes={"heads_per_task": heads_per_task})
    verify = kernel_for(
        KernelSpec(op="verify_attention", heads=SMALL, score=ScoreSpec()), changes={"heads_per_task": heads_per_task}
    )
    sparse = kernel_for(
        KernelSpec(op="sparse_attention", heads=SMALL, selection="kv_head"),
        changes={"key_tile": mixed.plan.integer("key_tile")},
    )
    problem = attention_problem(
        mixed.spec, q_lens=[5, 1, 3, 1], kv_lens=[900, 1200, 77, 300], page_size=16, seed=4, budget=90
    )
    together = run(mixed, problem)
    apart = dataclasses.replace(problem, mode=None)
    verified = run(verify, dataclasses.replace(apart, indices=None, counts=None))
    drafted = run(sparse, apart)
    rows = torch.tensor([0, 0, 0, 0, 0, 1, 0, 0, 0, 1], dtype=torch.bool)
    assert torch.equal(together.out, torch.where(rows[:, None, None], drafted.out, verified.out))
    assert torch.equal(together.lse, torch.where(rows[:, None], drafted.lse, verified.lse))
    assert together.scores is not None
    assert verified.scores is not None
    assert torch.equal(together.scores[0, :, :895], verified.scores[0, :, :895])
    assert together.scores[1].isnan().all()  # a drafting request's columns are not written


def test_load_kernels_serves_mixed_batches_and_refuses_bad_modes() -> None:
    kernels = load_kernels(SMALL)
    p = attention_problem(mixed_spec(), q_lens=[2, 1], kv_lens=[100, 60], page_size=16, seed=5, budget=10)
    assert p.indices is not None
    assert p.counts is not None
    assert p.mode is not None
    inputs = (p.q, p.k_cache, p.v_cache, p.page_table, p.kv_lens, p.cu_q)
    chosen = Selection(p.indices, p.counts)
    found = kernels.mixed_attention(*inputs, chosen, p.tail_start, p.mode, max_q=2)
    drafted = kernels.sparse_attention(*inputs, chosen, p.tail_start, max_q=2)
    assert torch.equal(found.out[2], drafted.out[2])
    with pytest.raises(SpecError, match=r"mode is torch\.int64"):
        kernels.mixed_attention(*inputs, chosen, p.tail_start, p.mode.long(), max_q=2)
    with pytest.raises(SpecError, match=r"mode has shape \(1,\)"):
        kernels.mixed_attention(*inputs, chosen, p.tail_start, p.mode[:1], max_q=2)
