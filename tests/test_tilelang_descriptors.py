"""TileLang's kernels that the tensor memory accelerator feeds: results by the twin in C, and what a binary asks for."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from specattn_codegen import space
from specattn_codegen.build.cubin import TensorMap, described
from specattn_codegen.errors import BuildError
from specattn_codegen.heads import HeadConfig
from specattn_codegen.plan import Plan
from specattn_codegen.processors import gpus
from specattn_codegen.proof.problems import attention_problem
from specattn_codegen.render import render
from specattn_codegen.spec import ScoreSpec

pytest.importorskip("tilelang", reason="TileLang is not installed")

from tilelang import env

from specattn_codegen.build import tilelang_compile
from specattn_codegen.build.disassemble import sass_opcodes
from tilelang_cases import SMALL, mixed_spec, twin, verdict, verify_spec

needs_nvcc = pytest.mark.skipif(not env.CUDA_HOME, reason="nvcc is not installed, and TileLang compiles with it")

LLAMA = HeadConfig(num_q_heads=32, num_kv_heads=8, head_dim=128)
PAGED_64 = dataclasses.replace(verify_spec(LLAMA, page_size=64), dtype="bfloat16")
H100 = gpus.find("h100")


def described_plan(**changes: int) -> Plan:
    plan = space.default_plan(PAGED_64, H100, "tilelang").replace(kv_load="descriptor", num_stages=3)
    return plan.replace(**changes)


@pytest.mark.parametrize("score", [None, ScoreSpec(), ScoreSpec(normaliser="reference")], ids=str)
def test_results_equal_the_oracle(score: ScoreSpec | None) -> None:
    """Strides are the descriptor's business, so that the twin knows caches without gaps alone."""
    heads = dataclasses.replace(SMALL, window=150) if score is None else SMALL
    kernel = twin(verify_spec(heads, score, page_size=64), kv_load="descriptor", num_stages=3)
    problem = attention_problem(
        kernel.spec, q_lens=[3, 0, 1, 2, 1, 5], kv_lens=[300, 40, 64, 1, -3, 433], page_size=64, seed=1, layout="nhd"
    )
    result = verdict(kernel, problem)
    assert result.passed, result.detail


def test_requests_that_verify_beside_others_that_draft_equal_the_oracle() -> None:
    """Lists of either kind end within a tile and within a share, and some begin with the oldest key of a window."""
    spec = mixed_spec(dataclasses.replace(SMALL, window=150), ScoreSpec(normaliser="reference"), page_size=64)
    kernel = twin(spec, kv_load="descriptor", num_stages=3)
    problem = attention_problem(
        spec,
        q_lens=[3, 0, 1, 2, 1, 5],
        kv_lens=[300, 40, 64, 1, -3, 433],
        page_size=64,
        seed=1,
        layout="nhd",
        budget=90,
    )
    for modes in ([0, 1, 0, 1, 0, 1], [1, 0, 1, 0, 1, 0]):
        mixed = dataclasses.replace(problem, mode=torch.tensor(modes, dtype=torch.int32))
        result = verdict(kernel, mixed)
        assert result.passed, (modes, result.detail)


def test_an_array_is_described_from_its_last_dimension() -> None:
    interleaved = torch.zeros(7, 4, 2, 3, 16, dtype=torch.float16)[:, :, 1]  # [pages, keys, heads, dim] of K and V
    assert described(interleaved) == ((16, 3, 4, 7), (32, 192, 768))


@needs_nvcc
def test_a_binary_is_fed_by_the_accelerator_and_multiplies_by_warp_groups() -> None:
    """From 64 packed rows on; the four warps that feed it come on top."""
    source = render(PAGED_64, described_plan(block_m=64), "tilelang")
    folder = tilelang_compile.compiled_folder(source, H100)
    attend, merge = tilelang_compile.read_manifest(folder)
    described_keys = TensorMap(
        array="k_cache",
        data_type=9,  # bfloat16
        box=(64, 64, 1, 1),
        steps=(1, 1, 1, 1),
        interleave=0,
        swizzle=3,  # of 128 bytes
        promotion=2,
        fill=0,
    )
    assert attend.tensor_maps == {
        "k_cache_desc": described_keys,
        "v_cache_desc": dataclasses.replace(described_keys, array="v_cache"),
    }
    assert merge.tensor_maps == {}
    kinds = [kind for kind, name in attend.parameters if name in attend.tensor_maps]
    assert kinds == ["CUtensorMap"] * 2
    assert not {"k_cache", "v_cache", "stride_k_page"} & {name for _, name in attend.parameters}
    assert attend.threads == 2 * 128
    opcodes = sass_opcodes(folder / "attend_splits.cubin")
    assert any(name.startswith("HGMMA") for name in opcodes)
    assert any(name.startswith("UTMALDG") for name in opcodes)
    assert not any(name.startswith(("HMMA", "LDGSTS")) for name in opcodes)


@needs_nvcc
@pytest.mark.parametrize("name", ["h100", "b200"])
def test_a_mixed_batch_is_fed_by_the_accelerator(name: str) -> None:
    """The warps that feed it leave no loop before the others do, so that all of them keep count of the work before."""
    arch = gpus.find(name)
    spec = dataclasses.replace(mixed_spec(LLAMA, page_size=64), dtype="bfloat16")
    plan = space.default_plan(spec, arch, "tilelang").replace(kv_load="descriptor", num_stages=3, block_m=64)
    folder = tilelang_compile.compiled_folder(render(spec, plan, "tilelang"), arch)
    attend, _ = tilelang_compile.read_manifest(folder)
    assert {one.array for one in attend.tensor_maps.values()} == {"k_cache", "v_cache"}
    assert {"k_pointer", "v_pointer", "stride_k_page", "num_pages"} <= {name for _, name in attend.parameters}
    assert attend.threads == 2 * 128
    assert attend.resources.spill_bytes == 0
    assert 0.9 * attend.resources.smem_bytes <= space.tilelang.smem_bytes(plan, spec, arch) <= arch.smem_per_block
    text = (folder / "attend_splits.cu").read_text()
    assert text.count("if (((int)threadIdx.x) < 128) {") == 1  # producers, and the others in what is else
    assert "if (128 <= ((int)threadIdx.x))" not in text
    opcodes = {opcode.partition(".")[0] for opcode in sass_opcodes(folder / "attend_splits.cubin")}
    assert {"UTMALDG", "HGMMA" if name == "h100" else "HMMA"} <= opcodes


def test_a_copy_that_is_quietly_read_through_pointers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    source = render(PAGED_64, described_plan(), "tilelang")
    monkeypatch.setattr(tilelang_compile, "lower_for_cuda", lambda *_: ())  # nothing that describes anything
    with pytest.raises(BuildError, match="k_cache and v_cache through pointers here; use kv_load=pointer"):
        tilelang_compile.compiled_folder(source, H100, vector=2)


@pytest.mark.parametrize(
    ("name", "page_size", "changes", "reason"),
    [
        ("a100", 64, {}, "a100 has no tensor memory accelerator"),
        ("h100", 16, {}, "page_size=16 is no multiple of block_n=64"),
        ("h100", 64, {"num_stages": 1}, "use num_stages=2 or more"),
        ("h100", 128, {"block_n": 128, "num_warps": 8}, "cannot add up 32 rows of 128 keys held by 8 warps; use 4"),
        ("h100", 64, {"kv_load": "pointer"}, "has one buffer of what is read through pointers"),
    ],
)
def test_plans_that_cannot_be_are_refused(name: str, page_size: int, changes: dict[str, int], reason: str) -> None:
    spec = dataclasses.replace(PAGED_64, page_size=page_size)
    assert reason in str(space.why_invalid(described_plan(**changes), spec, gpus.find(name)))
    for block_m in (32, 64):
        assert space.why_invalid(described_plan(block_m=block_m), PAGED_64, H100) is None
