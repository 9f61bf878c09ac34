"""Compiling TileLang for GPUs that are absent: through nvcc, resources from the binaries."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from specattn_codegen import space
from specattn_codegen.cli import tune
from specattn_codegen.errors import SpecError
from specattn_codegen.heads import HeadConfig
from specattn_codegen.processors import gpus
from specattn_codegen.render import render
from specattn_codegen.spec import KernelSpec, ScoreSpec

pytest.importorskip("tilelang", reason="TileLang is not installed")

from tilelang import env

from specattn_codegen.build import tilelang_compile, tilelang_lower

needs_nvcc = pytest.mark.skipif(not env.CUDA_HOME, reason="nvcc is not installed, and TileLang compiles with it")

LLAMA = HeadConfig(num_q_heads=32, num_kv_heads=8, head_dim=128)


def verify(score: ScoreSpec | None, heads: HeadConfig = LLAMA) -> KernelSpec:
    return KernelSpec(op="verify_attention", heads=heads, dtype="bfloat16", page_size=16, score=score)


# sm_80, sm_89, sm_90a and sm_100a with what differs most between them; benchmarks/results holds every target.
SAMPLE = {
    "l4": dataclasses.replace(verify(ScoreSpec(granularity="page_max", histogram=True)), kv_dtype="float8_e4m3"),
    "a100": KernelSpec(op="sparse_attention", heads=LLAMA, dtype="bfloat16", page_size=16, selection="layer"),
    "h100": verify(ScoreSpec()),
    "b200": KernelSpec(op="mixed_attention", heads=LLAMA, dtype="bfloat16", page_size=16, selection="kv_head"),
}


@needs_nvcc
@pytest.mark.parametrize("name", SAMPLE)
def test_default_plans_compile_and_fit(name: str) -> None:
    arch, spec = gpus.find(name), SAMPLE[name]
    plan = space.default_plan(spec, arch, "tilelang")
    source = render(spec, plan, "tilelang")
    resources = tilelang_compile.cross_compile(source, arch)
    expected = ["attend_splits", "merge_splits"] + (["score_keys"] if spec.score else [])
    assert [taken.kernel for taken in resources] == expected
    for taken in resources:
        assert taken.spill_bytes == 0, taken
        assert 4 <= taken.registers <= 255, taken
        assert taken.smem_bytes <= arch.smem_per_block, taken
        assert taken.binary_bytes > 1000, taken
        assert taken.num_warps == 4, taken
    estimate = space.tilelang.smem_bytes(plan, spec, arch)
    assert 0.9 * resources[0].smem_bytes <= estimate <= 1.1 * resources[0].smem_bytes
    folder = tilelang_compile.compiled_folder(source, arch)
    assert {file.name for file in folder.iterdir()} == {
        "kernels.json",
        *(f"{kernel}.{kind}" for kernel in expected for kind in ("cu", "cubin")),
    }
    for binary in tilelang_compile.read_manifest(folder):
        assert "cu_q" in {name for _, name in binary.parameters}
        assert (folder / f"{binary.name}.cubin").read_bytes()[:4] == b"\x7fELF"


@needs_nvcc
def test_selection_compiles_and_fits() -> None:
    arch = gpus.find("h100")
    spec = KernelSpec(op="select_kv", heads=LLAMA, selection="kv_head")
    plan = space.default_plan(spec, arch, "tilelang")
    resources = tilelang_compile.cross_compile(render(spec, plan, "tilelang"), arch)
    assert [taken.kernel for taken in resources] == ["select_rows", "unite_rows"]
    for taken in resources:
        assert taken.spill_bytes == 0, taken
        assert 4 <= taken.registers <= 255, taken
        assert taken.num_warps == 8, taken
    estimate = space.tilelang.selection_smem_bytes(plan)
    assert 0.9 * resources[0].smem_bytes <= estimate <= 1.1 * resources[0].smem_bytes <= 1.1 * arch.smem_per_block


@pytest.mark.parametrize("arch", ["a100", "l4", "h100", "b200", "rtx5090"])
def test_selection_has_plans_everywhere_and_says_why_not_others(arch: str) -> None:
    spec, gpu = KernelSpec(op="select_kv", heads=LLAMA, selection="layer"), gpus.find(arch)
    plan = space.default_plan(spec, gpu, "tilelang")
    assert plan in set(space.feasible(spec, gpu, "tilelang"))
    crowded = plan.replace(block_n=4096, num_warps=4)
    assert "gives a thread 32 scores, more than 16; use more warps" in str(space.why_invalid(crowded, spec, gpu))
    assert space.batch_invariant(plan) == plan


@pytest.mark.parametrize(
    ("spec", "read"),
    [(verify(None), "cp_async_gs<16>"), (SAMPLE["a100"], "*(uint4*)(k_cache")],
    ids=["verify", "selected keys"],
)
def test_queries_and_caches_are_read_sixteen_bytes_at_a_time(spec: KernelSpec, read: str) -> None:
    """Which a stride that is no multiple of eight elements forbids."""
    arch = gpus.find("h100")
    source = render(spec, space.default_plan(spec, arch, "tilelang"), "tilelang")
    wide, narrow = (tilelang_lower.lower_for_cuda(source, arch, vector)[0] for vector in (8, 1))
    assert read in wide.text
    assert read not in narrow.text
    assert wide.parameters == narrow.parameters
    assert wide.threads == 128
    assert ("int64_t", "stride_k_page") in wide.parameters


MISSING = {"tilelang": "pip install tilelang==0.1.15", "nvcc": "pip install 'nvidia-cuda-nvcc>=13'"}


@pytest.mark.parametrize("missing", MISSING)
@pytest.mark.parametrize("backend", ["tilelang", "all"])
def test_a_missing_compiler_is_one_line(
    missing: str, backend: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Which ends the command before it searches, and says what would do instead."""
    if missing == "nvcc":
        monkeypatch.setattr(env, "CUDA_HOME", str(tmp_path))
    else:
        monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    monkeypatch.setattr("sys.argv", ["specattn-tune", "--heads", "8,2,32", "--gpu", "h100", "--backend", backend])
    tilelang_compile.nvcc.cache_clear()
    with pytest.raises(SystemExit, match="2"):
        tune.main()
    tilelang_compile.nvcc.cache_clear()
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert MISSING[missing] in message
    assert "use --backend triton" in message


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (dataclasses.replace(verify(None), dtype="float32"), "TF32"),
        (verify(None, HeadConfig(num_q_heads=8, num_kv_heads=2, head_dim=40)), "multiples of 16"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_served_is_refused_with_what_is(spec: KernelSpec, reason: str) -> None:
    with pytest.raises(SpecError, match=reason) as refusal:
        space.default_plan(spec, gpus.find("h100"), "tilelang")
    assert "triton" in str(refusal.value)


def test_amd_is_refused() -> None:
    plan = space.default_plan(verify(None), gpus.find("h100"), "tilelang")
    assert "does not run on mi300x" in str(space.why_invalid(plan, verify(None), gpus.find("mi300x")))
