"""The CPU's verification and sparse attention against the float64 oracle, and the properties they promise."""

from __future__ import annotations

import dataclasses
import math
import platform
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from cases import HEADS, RAGGED, SCORES, SMALL, kernel_for, run, verdict, verify_spec
from specattn_codegen import paths, space
from specattn_codegen.build import cpu
from specattn_codegen.errors import SpecError
from specattn_codegen.heads import HeadConfig
from specattn_codegen.plan import Plan, Setting
from specattn_codegen.processors import cpu_info
from specattn_codegen.proof.check import check_attention
from specattn_codegen.proof.problems import attention_problem
from specattn_codegen.render import render
from specattn_codegen.space import cpu as space_cpu
from specattn_codegen.spec import FLOAT8, Dtype, KernelSpec, KvDtype, Op, ScoreHeads, ScoreSpec

TARGETS = [target for target, needs in cpu_info.NEEDS.items() if needs <= cpu_info.NEEDS[cpu_info.instruction_set()]]


def default_plan(spec: KernelSpec) -> Plan:
    return space.default_plan(spec, dataclasses.replace(cpu_info.detect(measure=False), target="generic"), "cpu")


def sparse_spec(heads: HeadConfig, dtype: Dtype = "float32", selection: ScoreHeads = "kv_head") -> KernelSpec:
    return KernelSpec(op="sparse_attention", heads=heads, dtype=dtype, selection=selection)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("shape", HEADS, ids=str)
def test_verification_with_scores_equals_the_oracle(shape: tuple[int, int, int], dtype: Dtype) -> None:
    score = ScoreSpec(rows="all", heads="kv_head") if shape[0] % 8 == 0 else ScoreSpec(rows="ends", heads="layer")
    kernel = kernel_for(verify_spec(HEADS[shape], dtype, score))
    for seed, (q_lens, kv_lens, page_size) in enumerate(RAGGED):
        problem = attention_problem(kernel.spec, q_lens=q_lens, kv_lens=kv_lens, page_size=page_size, seed=seed)
        result = verdict(kernel, problem)
        assert result.passed, (kv_lens, result.detail)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", HEADS, ids=str)
def test_sparse_attention_equals_the_oracle(shape: tuple[int, int, int], dtype: Dtype) -> None:
    selection: ScoreHeads = "layer" if shape[0] % 3 == 0 else "kv_head"
    kernel = kernel_for(sparse_spec(HEADS[shape], dtype, selection))
    for budget, (q_lens, kv_lens, page_size) in zip((50, 4000, 0), RAGGED, strict=True):
        problem = attention_problem(
            kernel.spec, q_lens=q_lens, kv_lens=kv_lens, page_size=page_size, seed=budget, budget=budget
        )
        result = verdict(kernel, problem)
        assert result.passed, (kv_lens, budget, result.detail)


@pytest.mark.parametrize("windowed", [False, True])
@pytest.mark.parametrize("score", SCORES, ids=lambda score: score.name)
def test_every_score_definition(score: ScoreSpec, windowed: bool) -> None:
    """With a window, rows of one request see different prefix keys, and the oldest are seen by none."""
    heads = dataclasses.replace(SMALL, window=50, softcap=4.0) if windowed else SMALL
    kernel = kernel_for(verify_spec(heads, "float32", score))
    problem = attention_problem(kernel.spec, q_lens=[3, 1, 6, 2], kv_lens=[900, 33, 6, 0], page_size=7, seed=3)
    result = verdict(kernel, problem)
    assert result.passed, result.detail


@pytest.mark.parametrize("kv_dtype", FLOAT8)
@pytest.mark.parametrize("target", TARGETS)
def test_8_bit_caches_with_scales_on_every_instruction_set(target: str, kv_dtype: KvDtype) -> None:
    heads = HeadConfig(num_q_heads=15, num_kv_heads=3, head_dim=40, v_head_dim=72, softcap=20.0)
    dtypes: tuple[Dtype, ...] = ("float32", "bfloat16")
    for dtype in dtypes:
        verify = KernelSpec(op="verify_attention", heads=heads, dtype=dtype, kv_dtype=kv_dtype, score=ScoreSpec())
        sparse = KernelSpec(op="sparse_attention", heads=heads, dtype=dtype, kv_dtype=kv_dtype, selection="kv_head")
        for spec in (verify, sparse):
            kernel = kernel_for(spec, target)
            problem = attention_problem(
                spec, q_lens=[5, 1, 2], kv_lens=[600, 17, 0], page_size=16, seed=1, budget=40, layout="hnd"
            )
            result = verdict(kernel, problem)
            assert result.passed, (spec.name, result.detail)


@pytest.mark.parametrize("kv_dtype", FLOAT8)
def test_every_8_bit_code_is_decoded_exactly(kv_dtype: KvDtype) -> None:
    """One key whose value is a code: its weight is 1, so out is the code itself, times the scale. NaN stays NaN."""
    heads = HeadConfig(num_q_heads=1, num_kv_heads=1, head_dim=1, v_head_dim=256)
    codes = torch.arange(256, dtype=torch.uint8)
    for target in TARGETS:
        spec = KernelSpec(op="verify_attention", heads=heads, kv_dtype=kv_dtype)
        kernel = kernel_for(spec, target)
        problem = attention_problem(spec, q_lens=[1], kv_lens=[1], page_size=1, seed=0)
        assert problem.v_scale is not None
        problem.v_cache[int(problem.page_table[0, 0]), 0, 0] = codes.view(problem.v_cache.dtype)
        expected = codes.view(problem.v_cache.dtype).float() * problem.v_scale
        torch.testing.assert_close(run(kernel, problem).out[0, 0], expected, rtol=0, atol=0, equal_nan=True)


def test_a_reference_that_is_the_log_sum_exp_gives_the_exact_scores() -> None:
    exact, reference = (kernel_for(verify_spec(SMALL, score=ScoreSpec(normaliser=n))) for n in ("exact", "reference"))
    problem = attention_problem(exact.spec, q_lens=[4, 1], kv_lens=[1300, 77], page_size=16, seed=8)
    one = run(exact, problem)
    other = run(reference, dataclasses.replace(problem, lse_ref=one.lse))
    torch.testing.assert_close(other.scores, one.scores, rtol=1e-5, atol=1e-30, equal_nan=True)
    assert torch.equal(other.out, one.out)


@pytest.mark.parametrize("reference", [-1e30, -200.0, 200.0, 1e30, math.inf, -math.inf, math.nan])
def test_scores_stay_finite_whatever_the_reference(reference: float) -> None:
    kernel = kernel_for(verify_spec(SMALL, score=ScoreSpec(normaliser="reference", histogram=True)))
    problem = attention_problem(kernel.spec, q_lens=[2], kv_lens=[500], page_size=16, seed=8)
    call = run(kernel, dataclasses.replace(problem, lse_ref=torch.full((2, 8), reference)))
    assert call.scores is not None
    assert call.histogram is not None
    prefix = call.scores[0, :, :498]
    assert prefix.isfinite().all()
    assert (prefix >= 0).all()
    assert (prefix > 0).any() == (-math.inf < reference < 100)
    assert (call.histogram.sum(-1) == 498).all()


ODD_HEADS = {
    "softcap": dataclasses.replace(SMALL, softcap=5.0),
    "window": dataclasses.replace(SMALL, window=40),
    "window of one key": dataclasses.replace(SMALL, window=1),
    "sinks": dataclasses.replace(SMALL, sinks=True),
    "all of them, Dv != D": HeadConfig(
        num_q_heads=6, num_kv_heads=2, head_dim=24, v_head_dim=50, softcap=3.0, window=77, sinks=True, scale=0.4
    ),
    "one element": HeadConfig(num_q_heads=1, num_kv_heads=1, head_dim=1),
}


@pytest.mark.parametrize("name", ODD_HEADS)
def test_softcap_window_sinks_and_odd_dims(name: str) -> None:
    verify = kernel_for(verify_spec(ODD_HEADS[name], score=ScoreSpec()))
    sparse = kernel_for(sparse_spec(ODD_HEADS[name]))
    for q_lens, kv_lens, page_size in RAGGED[1:]:
        sizes = {"q_lens": q_lens, "kv_lens": kv_lens, "page_size": page_size, "seed": 5}
        assert verdict(verify, attention_problem(verify.spec, **sizes)).passed
        assert verdict(sparse, attention_problem(sparse.spec, **sizes, budget=30)).passed


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_instruction_set_this_processor_runs(target: str, dtype: Dtype) -> None:
    heads = HeadConfig(num_q_heads=7, num_kv_heads=1, head_dim=80, softcap=30.0)
    kernel = kernel_for(verify_spec(heads, dtype, ScoreSpec()), target)
    problem = attention_problem(kernel.spec, q_lens=[5, 1], kv_lens=[600, 17], page_size=16, seed=1)
    assert verdict(kernel, problem).passed


PLANS: list[dict[str, Setting]] = [
    {"product": "fma", "key_tile": 16, "split_keys": 256, "prefetch": "none", "score_dump": "float32"},
    {"product": "fma", "key_tile": 128, "split_keys": 4096, "heads_per_task": "one", "score_dump": "float16"},
    {"product": "fma", "key_tile": 48, "split_keys": 384, "prefetch": "next_tile_l1", "score_dump": "float32"},
    {"product": "fma", "key_tile": 256, "split_keys": 1536, "prefetch": "next_tile_l1", "score_dump": "float16"},
    {"product": "bf16", "key_tile": 192, "split_keys": 768, "prefetch": "next_tile_l1", "score_dump": "bfloat16"},
    {"product": "bf16", "key_tile": 32, "split_keys": 512, "heads_per_task": "one", "score_dump": "bfloat16"},
    {"product": "bf16", "key_tile": 64, "split_keys": 4096, "prefetch": "none", "score_dump": "bfloat16"},
    {"product": "amx", "key_tile": 32, "split_keys": 512, "heads_per_task": "one", "score_dump": "bfloat16"},
    {"product": "amx", "key_tile": 128, "split_keys": 4096, "prefetch": "none", "score_dump": "bfloat16"},
]


def skip_unless_multiplied(product: Setting) -> None:
    targets = space_cpu.PRODUCT_TARGETS.get(str(product), tuple(TARGETS))
    if not set(targets) & set(TARGETS):
        pytest.skip(f"this processor has no instructions for product={product}")


@pytest.mark.parametrize("changes", PLANS, ids=lambda changes: f"{changes['product']}-{changes['key_tile']}")
@pytest.mark.parametrize("rows", [1, 5, 17])
def test_every_plan_gives_the_same_numbers(changes: dict[str, Setting], rows: int) -> None:
    """17 rows of a group of 5: more than four tiles of 16 packed rows."""
    skip_unless_multiplied(changes["product"])
    heads = HeadConfig(num_q_heads=10, num_kv_heads=2, head_dim=64, v_head_dim=48)
    kernel = kernel_for(verify_spec(heads, "bfloat16", ScoreSpec()), changes=changes)
    problem = attention_problem(kernel.spec, q_lens=[rows, 2], kv_lens=[2500, 300], page_size=16, seed=2)
    result = verdict(kernel, problem)
    assert result.passed, result.detail


REMADE = [ScoreSpec(), ScoreSpec(rows="ends", heads="layer"), ScoreSpec(rows="last", granularity="page_max")]


@pytest.mark.parametrize("product", ["fma", "bf16"])
@pytest.mark.parametrize("score", REMADE, ids=lambda score: score.name)
def test_weights_made_again_score_as_weights_kept(score: ScoreSpec, product: str) -> None:
    """Also where rows lie apart in the window, and where a task takes one head of several."""
    skip_unless_multiplied(product)
    dump = "bfloat16" if product == "bf16" else "float16"
    for heads, task_heads in ((SMALL, "all"), (ODD_HEADS["all of them, Dv != D"], "one"), (ODD_HEADS["window"], "all")):
        changes: dict[str, Setting] = {"product": product, "heads_per_task": task_heads, "score_dump": dump}
        spec = verify_spec(heads, "bfloat16", score)
        kept = kernel_for(spec, changes=changes)
        remade = kernel_for(spec, changes={**changes, "score_method": "remat"})
        for q_lens, kv_lens, page_size in RAGGED[1:]:
            problem = attention_problem(spec, q_lens=q_lens, kv_lens=kv_lens, page_size=page_size, seed=5)
            result = verdict(remade, problem)
            assert result.passed, result.detail
            assert torch.equal(run(remade, problem).out, run(kept, problem).out)


def emulated_amx_kernel(spec: KernelSpec, **changes: Setting) -> cpu.CpuKernel:
    """The tile engine with its AMX instructions in plain C++; the rest of it needs AVX512_BF16."""
    arch = dataclasses.replace(cpu_info.detect(measure=False), target="amx-bf16")
    source = render(spec, space.default_plan(spec, arch, "cpu").replace(**changes), arch.target)
    emulation = (Path(__file__).parent / "emulation" / "amx.h").read_text()
    include = "#include <immintrin.h>\n"
    assert source.text.count(include) == 1
    text = source.text.replace(include, include + emulation)
    return cpu.load(dataclasses.replace(source, text=text, target="avx512-bf16"))


@pytest.mark.skipif("avx512-bf16" not in TARGETS, reason="this processor has no AVX512_BF16")
@pytest.mark.parametrize("name", ["plain", "all of them, Dv != D"])
def test_the_tile_engine_on_emulated_amx(name: str) -> None:
    heads = {"plain": SMALL, **ODD_HEADS}[name]
    kernels = [
        emulated_amx_kernel(verify_spec(heads, "bfloat16", score))
        for score in (ScoreSpec(), ScoreSpec(normaliser="reference"), ScoreSpec(value="logit", heads="layer"))
    ]
    kernels += [
        emulated_amx_kernel(verify_spec(heads, "bfloat16", score), score_method="remat")
        for score in (ScoreSpec(), ScoreSpec(rows="ends"))
    ]
    for kernel in kernels:
        for q_lens, kv_lens, page_size in RAGGED[1:]:
            problem = attention_problem(kernel.spec, q_lens=q_lens, kv_lens=kv_lens, page_size=page_size, seed=5)
            result = verdict(kernel, problem)
            assert result.passed, (kernel.spec.name, result.detail)


@pytest.mark.parametrize("layout", ["nhd", "hnd", "interleaved"])
def test_cache_layouts_are_views(layout: str) -> None:
    kernel = kernel_for(verify_spec(SMALL, score=ScoreSpec()))
    problem = attention_problem(
        kernel.spec,
        q_lens=[3, 1],
        kv_lens=[200, 64],
        page_size=16,
        seed=4,
        layout=layout,  # pyright: ignore[reportArgumentType]
    )
    assert verdict(kernel, problem).passed


def test_peaked_softmax_keeps_its_tolerance() -> None:
    """Logits in the hundreds: almost all mass on one key, everything else underflows."""
    kernel = kernel_for(verify_spec(SMALL, score=ScoreSpec()))
    problem = attention_problem(kernel.spec, q_lens=[4], kv_lens=[1500], page_size=16, seed=6, magnitude=40.0)
    assert verdict(kernel, problem).passed


def test_out_is_bitwise_the_same_with_and_without_scores() -> None:
    plain, scored = kernel_for(verify_spec(SMALL)), kernel_for(verify_spec(SMALL, score=ScoreSpec()))
    problem = attention_problem(plain.spec, q_lens=[5, 2], kv_lens=[1300, 77], page_size=16, seed=8)
    one, other = run(plain, problem), run(scored, problem)
    assert torch.equal(one.out, other.out)
    assert torch.equal(one.lse, other.lse)


def test_results_do_not_depend_on_threads_or_neighbours() -> None:
    """Splits have a fixed length, so a request alone, on one thread, gives the bits it gives in a batch on two."""
    kernel = kernel_for(verify_spec(SMALL, score=ScoreSpec()), changes={"split_keys": 256})
    together = attention_problem(kernel.spec, q_lens=[3, 5], kv_lens=[2000, 700], page_size=16, seed=9)
    threads = torch.get_num_threads()
    both = run(kernel, together)
    alone = dataclasses.replace(
        together,
        q=together.q[:3],
        page_table=together.page_table[:1],
        kv_lens=together.kv_lens[:1],
        cu_q=together.cu_q[:2],
        max_q=3,
    )
    try:
        torch.set_num_threads(1)
        single = run(kernel, alone)
    finally:
        torch.set_num_threads(threads)
    assert both.scores is not None
    assert single.scores is not None
    assert torch.equal(both.out[:3], single.out)
    assert torch.equal(both.scores[0, :, :1997], single.scores[0, :, :1997])


def test_a_drafting_request_has_the_same_bits_alone() -> None:
    """Whatever its neighbours select, under any bounds."""
    kernel = kernel_for(sparse_spec(SMALL))
    together = attention_problem(
        kernel.spec, q_lens=[2, 1, 3], kv_lens=[90, 3000, 40], page_size=16, seed=9, budget=1500
    )
    assert together.indices is not None
    assert together.counts is not None
    one = run(kernel, together)
    for request, rows in enumerate((slice(0, 2), slice(2, 3), slice(3, 6))):
        alone = dataclasses.replace(
            together,
            q=together.q[rows],
            page_table=together.page_table[request : request + 1],
            kv_lens=together.kv_lens[request : request + 1],
            cu_q=torch.tensor([0, rows.stop - rows.start], dtype=torch.int32),
            max_kv=int(together.kv_lens[request]),
            indices=together.indices[request : request + 1],
            counts=together.counts[request : request + 1],
            tail_start=together.tail_start[request : request + 1],
        )
        found = run(kernel, alone)
        assert torch.equal(found.out, one.out[rows])
        assert torch.equal(found.lse, one.lse[rows])


@pytest.mark.parametrize("op", ["verify_attention", "sparse_attention"])
def test_a_page_that_the_cache_does_not_have_is_refused_and_one_past_a_length_ignored(op: Op) -> None:
    kernel = kernel_for(verify_spec(SMALL) if op == "verify_attention" else sparse_spec(SMALL))
    problem = attention_problem(kernel.spec, q_lens=[1, 2], kv_lens=[40, 100], page_size=16, seed=12, budget=500)
    right = run(kernel, problem).out.clone()
    problem.page_table[0, 3:] = 1 << 30
    assert problem.page_table.shape[1] > 3
    assert torch.equal(run(kernel, problem).out, right)
    problem.page_table[1, 2] = problem.k_cache.shape[0]
    with pytest.raises(SpecError, match=rf"page_table\[1, 2\]={problem.k_cache.shape[0]}: the cache has"):
        run(kernel, problem)


@pytest.mark.parametrize("longest", [1500, 24_000], ids=["near", "far"])
@pytest.mark.parametrize("heads_per_task", ["one", "all"])
def test_kept_weights_of_many_requests_share_memory(heads_per_task: str, longest: int) -> None:
    """More requests than are under way at once: most have the memory that another left, whatever the threads. Where one
    may be long, weights are written past the caches."""
    kernel = kernel_for(
        verify_spec(SMALL, score=ScoreSpec()), changes={"split_keys": 256, "heads_per_task": heads_per_task}
    )
    problem = attention_problem(
        kernel.spec,
        q_lens=[3, 5, 2, 0, 5, 1, 4, 5, 3, 2, 1],
        kv_lens=[700, longest, 0, 300, 5, 900, 513, 1200, 64, 700, 1100],
        page_size=16,
        seed=17,
    )
    found = run(kernel, problem)
    result = check_attention(kernel.spec, problem, found.out, found.lse, found.scores)
    assert result.passed, result.detail
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = run(kernel, problem)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found.out, alone.out)
    assert found.scores is not None
    assert alone.scores is not None
    assert torch.equal(found.scores.nan_to_num(-1.0), alone.scores.nan_to_num(-1.0))


def test_columns_past_the_prefix_are_never_written() -> None:
    kernel = kernel_for(verify_spec(SMALL, score=ScoreSpec()))
    call = run(kernel, attention_problem(kernel.spec, q_lens=[5, 3], kv_lens=[50, 3], page_size=16, seed=10))
    assert call.scores is not None
    assert call.scores[0, :, :45].isfinite().all()
    assert call.scores[0, :, 45:].isnan().all()
    assert call.scores[1].isnan().all()


def test_scores_of_the_prefix_and_the_rows_own_weights_sum_to_one() -> None:
    """With one row, prefix scores and the row's weight on its own key are the whole softmax."""
    kernel = kernel_for(verify_spec(SMALL, score=ScoreSpec()))
    problem = attention_problem(kernel.spec, q_lens=[1], kv_lens=[1000], page_size=16, seed=11)
    call = run(kernel, problem)
    assert call.scores is not None
    key = problem.k_cache[int(problem.page_table[0, 999 // 16]), 999 % 16].double().repeat_interleave(4, dim=0)
    own = torch.exp((problem.q[0].double() * key).sum(-1) * SMALL.scale - call.lse[0].double()).view(2, 4).mean(1)
    torch.testing.assert_close(
        call.scores[0, :, :999].double().sum(-1) + own, torch.ones(2).double(), atol=1e-5, rtol=0
    )


def test_a_build_is_kept_and_used_again(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setenv("SPECATTN_CACHE_DIR", str(tmp_path))
    spec = verify_spec(HEADS[32, 8, 128], "bfloat16", ScoreSpec())
    kernel_for(spec)
    (built,) = paths.cache_dir().rglob("kernel.so")
    stamp = built.stat().st_mtime_ns
    kernel_for(spec)
    assert built.stat().st_mtime_ns == stamp


@pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump is not installed")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="names x86 instructions")
@pytest.mark.parametrize("op", ["verify_attention", "sparse_attention"])
def test_rows_are_fetched_ahead_in_the_machine_code(monkeypatch: pytest.MonkeyPatch, tmp_path: object, op: Op) -> None:
    """A compiler may drop a call that does nothing but prefetch; results would not tell."""
    monkeypatch.setenv("SPECATTN_CACHE_DIR", str(tmp_path))
    counts: dict[Setting, int] = {}
    settings: tuple[Setting, ...] = ("none", "next_tile")
    spec = KernelSpec(op=op, heads=SMALL, selection="kv_head" if op == "sparse_attention" else None)
    for prefetch in settings:
        source = render(spec, default_plan(spec).replace(prefetch=prefetch), "generic")
        library = cpu.compile_library(source.text, "generic", spec.name)
        shown = subprocess.run(["objdump", "-d", str(library)], capture_output=True, text=True, check=True).stdout
        counts[prefetch] = shown.count("prefetch")
    assert counts["none"] == 0
    assert counts["next_tile"] > 0


def test_a_nan_query_head_gives_nan_and_harms_no_other() -> None:
    dtypes: tuple[Dtype, ...] = ("float32", "bfloat16")
    for dtype in dtypes:
        kernel = kernel_for(verify_spec(SMALL, dtype))
        problem = attention_problem(kernel.spec, q_lens=[3], kv_lens=[300], page_size=16, seed=12)
        clean = run(kernel, problem)
        problem.q[1, 5] = float("nan")
        dirty = run(kernel, problem)
        assert dirty.out[1, 5].isnan().all()
        assert dirty.lse[1, 5].isnan()
        others = torch.ones(3, 8, dtype=torch.bool)
        others[1, 5] = False
        assert torch.equal(dirty.out[others], clean.out[others])


@pytest.mark.parametrize("block", [2, 16, 17])
def test_an_index_may_name_a_block_of_keys(block: int) -> None:
    """The last block may reach past the tail's start: there it adds nothing, as the tail holds those keys already."""
    kernel = kernel_for(sparse_spec(SMALL))
    for q_lens, kv_lens, page_size in RAGGED[1:]:
        problem = attention_problem(
            kernel.spec, q_lens=q_lens, kv_lens=kv_lens, page_size=page_size, seed=14, budget=7, block=block
        )
        result = verdict(kernel, problem)
        assert result.passed, result.detail
        everything = attention_problem(
            kernel.spec, q_lens=q_lens, kv_lens=kv_lens, page_size=page_size, seed=15, budget=5000, block=block
        )
        dense = run(kernel_for(verify_spec(SMALL)), everything)
        torch.testing.assert_close(run(kernel, everything).out, dense.out)


def test_indices_that_name_no_selectable_key_are_hidden_wherever_they_stand() -> None:
    """Unsorted, negative, at or past the tail, past every key: the rest of the selection counts as if alone."""
    kernel = kernel_for(sparse_spec(SMALL))
    problem = attention_problem(kernel.spec, q_lens=[2], kv_lens=[100], page_size=16, seed=13, budget=6)
    messy = torch.tensor([90, -1, 3, 98, 2**31 - 1, 41, 99, 7], dtype=torch.int32).expand(1, 2, 8).contiguous()
    tidy = torch.tensor([3, 7, 41, 90], dtype=torch.int32).expand(1, 2, 4).contiguous()
    results = [
        run(kernel, dataclasses.replace(problem, indices=indices, counts=torch.full((1, 2), indices.shape[2]).int()))
        for indices in (messy, tidy)
    ]
    torch.testing.assert_close(results[0].out, results[1].out)
    torch.testing.assert_close(results[0].lse, results[1].lse)
