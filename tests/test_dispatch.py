"""load_kernels as a user calls it: the documented example, clear refusals, caller-owned memory, torch operators."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import pytest
import torch

from cases import poisoned
from specattn_codegen import HeadConfig, ScoreSpec, SpecError
from specattn_codegen.calls import AttentionInputs
from specattn_codegen.policy import Policy
from specattn_codegen.proof import reference
from specattn_codegen.proof.check import check_attention
from specattn_codegen.proof.problems import AttentionProblem, attention_problem
from specattn_codegen.results import Selection, VerifyOutput
from specattn_codegen.spec import KernelSpec
from specattn_runtime import Kernels, Threshold, TopK, TopP, load_kernels, torch_ops

HEADS = HeadConfig(num_q_heads=8, num_kv_heads=2, head_dim=32)
SPEC = KernelSpec(op="sparse_attention", heads=HEADS, selection="kv_head")
SCORE = ScoreSpec(rows="all", heads="kv_head", value="weight")
PAGES = ScoreSpec(normaliser="reference", granularity="page_max", histogram=True)


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return load_kernels(HEADS, device="cpu", dtype=torch.float32, page_size=16)


@pytest.fixture
def problem() -> AttentionProblem:
    return attention_problem(SPEC, q_lens=[3, 2], kv_lens=[300, 40], page_size=16, seed=0, budget=20)


def inputs(p: AttentionProblem) -> AttentionInputs:
    return AttentionInputs(p.q, p.k_cache, p.v_cache, p.page_table, p.kv_lens, p.cu_q)


def test_verify_select_sparse_as_documented(kernels: Kernels, problem: AttentionProblem) -> None:
    verified = kernels.verify_attention(*inputs(problem), max_q=3, score=SCORE)
    expected = reference.verify_attention(*inputs(problem), heads=HEADS, score=SCORE, max_kv=problem.max_kv)
    assert verified.scores is not None
    assert expected.scores is not None
    torch.testing.assert_close(verified.out.double(), expected.out, atol=1e-5, rtol=1e-5)
    prefix_lens = problem.tail_start
    chosen = kernels.select_kv(verified.scores, prefix_lens, TopK(ratio=0.05, min=16), sink=4, recent=8)
    assert chosen.counts.tolist() == [[16, 16], [16, 16]]
    out, lse = kernels.sparse_attention(*inputs(problem), chosen, problem.tail_start, max_q=3)
    sparse = reference.sparse_attention(*inputs(problem), chosen, problem.tail_start, heads=HEADS)
    torch.testing.assert_close(out.double(), sparse.out, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse.double(), sparse.lse, atol=1e-5, rtol=1e-5)


def test_callers_memory_is_used_and_nothing_else(kernels: Kernels, problem: AttentionProblem) -> None:
    out = VerifyOutput(torch.empty(5, 8, 32), torch.empty(5, 8), torch.full((2, 2, problem.max_kv), float("nan")))
    result = kernels.verify_attention(*inputs(problem), max_q=3, score=SCORE, out=out, workspace=poisoned(1 << 22))
    assert result.out.data_ptr() == out.out.data_ptr()
    assert out.scores is not None
    assert out.scores[0, :, :297].isfinite().all()
    with pytest.raises(SpecError, match="workspace"):
        kernels.verify_attention(*inputs(problem), max_q=3, workspace=poisoned(16))


def test_a_call_without_scores_looks_at_no_place_for_them(kernels: Kernels, problem: AttentionProblem) -> None:
    """As the operators have it, which must return tensors: of no elements, on one axis."""
    out = VerifyOutput(torch.empty(5, 8, 32), torch.empty(5, 8), torch.zeros(0), torch.zeros(0, dtype=torch.int32))
    given = kernels.verify_attention(*inputs(problem), max_q=3, out=out)
    assert given.scores is given.histogram is None
    assert torch.equal(out.out, kernels.verify_attention(*inputs(problem), max_q=3).out)


def test_a_missing_entry_warns_once_and_strict_raises(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    monkeypatch.setenv("SPECATTN_CONFIG_DIR", str(tmp_path))
    heads = HeadConfig(num_q_heads=2, num_kv_heads=2, head_dim=8)
    spec = KernelSpec(op="verify_attention", heads=heads)
    p = attention_problem(spec, q_lens=[1], kv_lens=[9], page_size=4, seed=1)
    with caplog.at_level(logging.WARNING, logger="specattn"):
        fresh = load_kernels(heads, page_size=4)
        fresh.verify_attention(*inputs(p), max_q=1)
        fresh.verify_attention(*inputs(p), max_q=1, score=SCORE)
    assert len(caplog.records) == 1
    assert "specattn-tune --heads 2,2,8 --gpu cpu" in caplog.text
    assert set(fresh.rungs.values()) == {"default"}
    with pytest.raises(SpecError, match="specattn-tune"):
        load_kernels(heads, page_size=4, strict=True).verify_attention(*inputs(p), max_q=1)


def test_batch_invariant_kernels_use_one_plan_for_every_size() -> None:
    kernels = load_kernels(HEADS, page_size=16, batch_invariant=True)
    for kv_len in (20, 3000):
        p = attention_problem(SPEC, q_lens=[1], kv_lens=[kv_len], page_size=16, seed=2, budget=4)
        kernels.verify_attention(*inputs(p), max_q=1)
    assert len(kernels.rungs) == 1


Change = Callable[[AttentionProblem], dict[str, object]]
BAD_INPUTS: dict[str, tuple[Change, str]] = {
    "dtype": (lambda p: {"q": p.q.half()}, r"q is torch.float16"),
    "rows shape": (lambda p: {"q": p.q[:, :4]}, r"q has shape \(5, 4, 32\)"),
    "page size": (lambda p: {"k_cache": p.k_cache[:, :8]}, r"k_cache has shape"),
    "table dtype": (lambda p: {"page_table": p.page_table.long()}, r"page_table is torch.int64"),
    "lengths": (lambda p: {"kv_lens": p.kv_lens + 100_000}, r"max_kv=\d+: a request has"),
    "a page past the cache": (
        lambda p: {"page_table": p.page_table + 10_000},
        r"page_table\[0, 0\]=1\d{4}: the cache has",
    ),
    "a page before it": (lambda p: {"page_table": p.page_table - 10_000}, r"page_table\[0, 0\]=-\d+: the cache has"),
    "no pages": (lambda p: {"k_cache": p.k_cache[:0], "v_cache": p.v_cache[:0]}, r"the cache has 0 pages"),
    "cu_q": (lambda p: {"cu_q": p.cu_q + 1}, r"cu_q=\["),
    "max_q": (lambda _: {"max_q": 1}, r"max_q=1: a request has 3 rows"),
    "max_kv": (lambda _: {"max_kv": 10**9}, r"max_kv=1000000000"),
    "stride": (lambda p: {"q": p.q.repeat_interleave(2, dim=2)[:, :, ::2]}, r"last stride 2"),
    "sinks": (lambda _: {"sinks": torch.zeros(8)}, r"leave sinks out"),
    "a list for rows": (lambda p: {"q": p.q.tolist()}, r"q is of type list: must be a torch.Tensor"),
    "a list for lengths": (lambda p: {"kv_lens": p.kv_lens.tolist()}, r"kv_lens is of type list"),
    "a list for a table": (lambda p: {"page_table": p.page_table.tolist()}, r"page_table is of type list"),
    "a word for scores": (lambda _: {"score": "all"}, r"score is of type str: must be a ScoreSpec"),
    "a tensor for an output": (lambda p: {"out": p.q.clone()}, r"out is of type Tensor"),
}


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_inputs_get_one_clear_error(kernels: Kernels, problem: AttentionProblem, name: str) -> None:
    change, words = BAD_INPUTS[name]
    names = ("q", "k_cache", "v_cache", "page_table", "kv_lens", "cu_q")
    arguments: dict[str, object] = dict(zip(names, inputs(problem), strict=True)) | {"max_q": 3} | change(problem)
    with pytest.raises(SpecError, match=words):
        kernels.verify_attention(**arguments)  # pyright: ignore[reportArgumentType]


def test_bad_selections_are_refused(kernels: Kernels, problem: AttentionProblem) -> None:
    wrong_rows = Selection(torch.zeros(2, 3, 4, dtype=torch.int32), torch.zeros(2, 3, dtype=torch.int32))
    with pytest.raises(SpecError, match="3 rows per request"):
        kernels.sparse_attention(*inputs(problem), wrong_rows, problem.tail_start, max_q=3)
    blocks = Selection(torch.zeros(2, 2, 4, dtype=torch.int32), torch.zeros(2, 2, dtype=torch.int32), block=0)
    with pytest.raises(SpecError, match="block=0"):
        kernels.sparse_attention(*inputs(problem), blocks, problem.tail_start, max_q=3)
    indices, counts = torch.zeros(2, 2, 4, dtype=torch.int32), torch.zeros(2, 2, dtype=torch.int32)
    wide = torch.zeros(2, 2, 8, dtype=torch.int32)
    bad_slots: dict[str, Selection] = {
        r"selection\.slots is torch\.int16": Selection(indices, counts, slots=indices.short()),
        r"selection\.slots has shape": Selection(indices, counts, slots=indices[:1]),
        r"selection\.slots has strides \(16, 8, 1\)": Selection(indices, counts, slots=wide[:, :, :4]),
        r"page_size=16, block=3: slots need": Selection(indices, counts, 3, indices),
    }
    for words, selection in bad_slots.items():
        with pytest.raises(SpecError, match=words):
            kernels.sparse_attention(*inputs(problem), selection, problem.tail_start, max_q=3)
    with pytest.raises(SpecError, match="selection is of type tuple: must be a Selection"):
        kernels.sparse_attention(*inputs(problem), (indices, counts), problem.tail_start, max_q=3)  # pyright: ignore[reportArgumentType]
    with pytest.raises(SpecError, match="policy is of type int: must be TopK, TopP or Threshold"):
        kernels.select_kv(torch.zeros(1, 2, 8), torch.tensor([8], dtype=torch.int32), 8)  # pyright: ignore[reportArgumentType]
    with pytest.raises(SpecError, match="sink=-1"):
        kernels.select_kv(torch.zeros(1, 2, 8), torch.tensor([8], dtype=torch.int32), TopK(k=2), sink=-1)


def test_tensors_elsewhere_and_huge_forced_runs_do_no_harm(kernels: Kernels) -> None:
    with pytest.raises(SpecError, match="loaded for cpu"):
        kernels.select_kv(torch.zeros(1, 2, 8, device="meta"), torch.zeros(1, dtype=torch.int32), TopK(k=2))
    prefix_lens = torch.tensor([50], dtype=torch.int32)
    chosen = kernels.select_kv(torch.rand(1, 2, 50), prefix_lens, TopK(k=10), sink=2**40, recent=3_000_000_000)
    assert chosen.counts.tolist() == [[50, 50]]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"page_size": 0}, "page_size=0"),
        ({"dtype": torch.float64}, "float64"),
        ({"device": "meta"}, "meta"),
        ({"device": "gpu"}, "device='gpu': must be cpu or cuda"),
        ({"heads": "llama3-8b"}, "heads is of type str: must be a HeadConfig"),
    ],
)
def test_bad_load_arguments(arguments: dict[str, object], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        load_kernels(**{"heads": HEADS, **arguments})


SELECTIONS: dict[str, tuple[Policy, dict[str, object]]] = {
    "k": (TopK(k=5), {"k": 5}),
    "ratio": (TopK(ratio=0.3, min=4, max=9), {"ratio_ppm": 300_000, "min_keys": 4, "max_keys": 9}),
    "p": (TopP(0.5, min=4), {"p": 0.5, "min_keys": 4}),
    "bisection": (TopP(0.5, max=30, bisection_steps=4), {"p": 0.5, "max_keys": 30, "bisection_steps": 4}),
    "threshold": (Threshold(0.4), {"threshold": 0.4}),
}


@pytest.mark.parametrize("name", SELECTIONS)
@pytest.mark.parametrize(("shape", "union"), [((2, 6, 50), 3), ((3, 2, 2, 50), 1)])
def test_selection_as_an_operator(kernels: Kernels, name: str, shape: tuple[int, ...], union: int) -> None:
    policy, numbers = SELECTIONS[name]
    scores = torch.rand(shape, generator=torch.Generator().manual_seed(3))
    prefix_lens, forced = (
        torch.tensor([200, 70], dtype=torch.int32),
        {"sink": 3, "recent": 9, "block": 4, "union": union},
    )
    operator = torch.ops.specattn.select_kv.default
    assert set(torch.library.opcheck(operator, (scores, prefix_lens), numbers | forced).values()) == {"SUCCESS"}
    expected = kernels.select_kv(scores, prefix_lens, policy, sink=3, recent=9, block=4, union=union)
    indices, counts = operator(scores, prefix_lens, **numbers, **forced)
    assert torch.equal(indices, expected.indices)
    assert torch.equal(counts, expected.counts)


def test_an_operator_takes_one_policy() -> None:
    with pytest.raises(SpecError, match="exactly one of k"):
        torch.ops.specattn.select_kv(torch.rand(1, 1, 8), torch.tensor([8], dtype=torch.int32), k=2, p=0.5)


def test_a_selection_starts_from_the_histogram_of_its_verification(kernels: Kernels, problem: AttentionProblem) -> None:
    verified = kernels.verify_attention(*inputs(problem), max_q=3, score=ScoreSpec(histogram=True))
    assert verified.scores is not None
    assert verified.histogram is not None
    chosen = [
        kernels.select_kv(verified.scores, problem.tail_start, TopK(k=30), sink=4, recent=8, histogram=histogram)
        for histogram in (None, verified.histogram)
    ]
    assert torch.equal(chosen[0].indices, chosen[1].indices)


def test_slots_are_places_in_the_cache_the_kernels_were_loaded_for(kernels: Kernels) -> None:
    table = torch.tensor([[7, 3]], dtype=torch.int32)  # pages of 16 keys
    prefix_lens = torch.tensor([20], dtype=torch.int32)
    chosen = kernels.select_kv(torch.arange(20.0).view(1, 1, 20), prefix_lens, TopK(k=6), page_table=table)
    assert chosen.slots is not None
    assert chosen.slots.tolist() == [[[7 * 16 + 14, 7 * 16 + 15, *range(48, 52)]]]


def test_operators_pass_opcheck_and_equal_the_kernels(kernels: Kernels, problem: AttentionProblem) -> None:
    p, scale = problem, HEADS.scale
    assert p.indices is not None
    assert p.counts is not None
    calls = {
        torch.ops.specattn.verify_attention.default: (*inputs(p), 3, scale, -1, 0.0, 0, None, "all", "kv_head"),
        torch.ops.specattn.sparse_attention.default: (*inputs(p), p.indices, p.counts, p.tail_start, 3, scale),
    }
    for operator, arguments in calls.items():
        assert set(torch.library.opcheck(operator, arguments).values()) == {"SUCCESS"}
    slots = reference.physical_slots(p.indices, p.page_table, 16)
    selected = (*inputs(p), p.indices, p.counts, p.tail_start, 3, scale)
    placed = torch_ops.sparse_attention(*selected, slots=slots)
    assert torch.equal(placed[0], torch_ops.sparse_attention(*selected)[0])
    out, lse, scores, histogram = torch_ops.verify_attention(*inputs(p), 3, scale, score_rows="all")
    expected = kernels.verify_attention(*inputs(p), max_q=3, score=SCORE)
    assert expected.scores is not None
    assert torch.equal(out, expected.out)
    assert torch.equal(lse, expected.lse)
    assert torch.equal(scores[0, :, :297], expected.scores[0, :, :297])
    assert (scores[0, :, 297:] == 0).all()
    assert histogram.numel() == 0
    plain = torch_ops.verify_attention(*inputs(p), 3, scale)
    assert torch.equal(plain[0], out)
    assert plain[2].numel() == plain[3].numel() == 0


def test_a_mixed_batch_as_an_operator(kernels: Kernels, problem: AttentionProblem) -> None:
    """The second request drafts: what it attends to is the kernels', and its scores and counts are 0."""
    p, mode = problem, torch.tensor([0, 1], dtype=torch.int32)
    assert p.indices is not None
    assert p.counts is not None
    operator = torch.ops.specattn.mixed_attention.default
    arguments = (*inputs(p), p.indices, p.counts, p.tail_start, mode, 3, HEADS.scale)
    scored = {"score_rows": "ends", "score_heads": "layer", "score_histogram": True}
    assert set(torch.library.opcheck(operator, arguments, scored).values()) == {"SUCCESS"}
    out, lse, scores, histogram = operator(*arguments, **scored)
    chosen, score = Selection(p.indices, p.counts), ScoreSpec(rows="ends", heads="layer", histogram=True)
    expected = kernels.mixed_attention(*inputs(p), chosen, p.tail_start, mode, max_q=3, score=score)
    assert expected.scores is not None
    assert torch.equal(out, expected.out)
    assert torch.equal(lse, expected.lse)
    assert expected.histogram is not None
    assert torch.equal(histogram, expected.histogram)
    assert torch.equal(scores[0, :, :297], expected.scores[0, :, :297])
    assert (scores[0, :, 297:] == 0).all()
    assert (scores[1] == 0).all()
    slots = reference.physical_slots(p.indices, p.page_table, 16)
    assert torch.equal(operator(*arguments, **scored, slots=slots)[0], out)


def test_the_verification_operator_serves_references_pages_and_8_bit_caches(problem: AttentionProblem) -> None:
    operator = torch.ops.specattn.verify_attention.default
    scores = {
        "score_rows": "all",
        "score_normaliser": "reference",
        "score_granularity": "page_max",
        "score_histogram": True,
    }
    plain = {**scores, "lse_ref": torch.zeros(5, 8)}
    assert set(torch.library.opcheck(operator, (*inputs(problem), 3, HEADS.scale), plain).values()) == {"SUCCESS"}

    spec = KernelSpec(op="verify_attention", heads=HEADS, kv_dtype="float8_e4m3", score=PAGES)
    p = attention_problem(spec, q_lens=[3, 1], kv_lens=[200, 40], page_size=16, seed=1)
    arguments = (*inputs(p), 3, HEADS.scale)
    given = {**scores, "lse_ref": p.lse_ref, "k_scale": p.k_scale, "v_scale": p.v_scale}
    out, lse, found, histogram = operator(*arguments, **given)
    found[0, :, -(-197 // 16) :] = math.nan  # the operator zeroes what no kernel writes
    found[1, :, -(-39 // 16) :] = math.nan
    assert check_attention(spec, p, out, lse, found, histogram=histogram).passed
    bad = {"score_granularity": "pages"}, {"lse_ref": None}
    for change, words in zip(bad, ("granularity='pages'", "lse_ref"), strict=True):
        with pytest.raises(SpecError, match=words):
            operator(*arguments, **{**given, **change})
    with pytest.raises(SpecError, match="no scale"):
        torch.ops.specattn.verify_attention(*inputs(problem), 3, HEADS.scale, k_scale=torch.ones(1))


def test_8_bit_caches_come_in_their_own_dtype_or_as_bytes_with_scales_of_one_or_every_head() -> None:
    spec = KernelSpec(op="verify_attention", heads=HEADS, kv_dtype="float8_e5m2")
    p = attention_problem(spec, q_lens=[2], kv_lens=[90], page_size=16, seed=2)
    kernels = load_kernels(HEADS, kv_dtype=torch.float8_e5m2)
    given = kernels.verify_attention(*inputs(p), max_q=2, k_scale=p.k_scale, v_scale=p.v_scale)
    raw = inputs(p)._replace(k_cache=p.k_cache.view(torch.uint8), v_cache=p.v_cache.view(torch.uint8))
    same = kernels.verify_attention(*raw, max_q=2, k_scale=p.k_scale, v_scale=p.v_scale)
    assert torch.equal(same.out, given.out)
    unscaled = kernels.verify_attention(*inputs(p), max_q=2)
    ones = kernels.verify_attention(*inputs(p), max_q=2, k_scale=torch.ones(2), v_scale=torch.ones(()))
    assert torch.equal(unscaled.out, ones.out)
    for bad in (torch.ones(3), torch.ones(2, dtype=torch.float64), torch.ones(1, 2)):
        with pytest.raises(SpecError, match="one for each of 2 KV heads"):
            kernels.verify_attention(*inputs(p), max_q=2, k_scale=bad)
    with pytest.raises(SpecError, match="kv_dtype"):
        load_kernels(HEADS, dtype=torch.float32, kv_dtype=torch.float16)
