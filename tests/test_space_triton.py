"""Triton's search space: default plans exist and are valid everywhere, and each rule says why it refuses."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from cases import HEADS
from specattn_codegen import space
from specattn_codegen.errors import SpecError
from specattn_codegen.heads import HeadConfig
from specattn_codegen.plan import Setting
from specattn_codegen.processors import gpus
from specattn_codegen.spec import DTYPES, FLOAT8, Dtype, KernelSpec, ScoreSpec

LLAMA = HEADS[32, 8, 128]
GEMMA = HeadConfig(num_q_heads=8, num_kv_heads=4, head_dim=256, softcap=50.0, window=4096)
VERIFY = KernelSpec(op="verify_attention", heads=LLAMA, dtype="bfloat16", page_size=16)
PAGE_64 = dataclasses.replace(VERIFY, kv_dtype="float8_e4m3", page_size=64)
REFERENCE = dataclasses.replace(VERIFY, score=ScoreSpec(normaliser="reference"))
LOGIT = dataclasses.replace(VERIFY, score=ScoreSpec(value="logit"))
ODD = HeadConfig(num_q_heads=4, num_kv_heads=2, head_dim=100)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [*HEADS.values(), GEMMA], ids=lambda heads: heads.name)
def test_default_plans_are_valid_on_every_gpu(heads: HeadConfig, dtype: Dtype) -> None:
    specs = [
        KernelSpec(op="verify_attention", heads=heads, dtype=dtype, page_size=16, score=ScoreSpec()),
        KernelSpec(op="sparse_attention", heads=heads, dtype=dtype, page_size=16, selection="layer"),
        KernelSpec(op="select_kv", heads=heads, selection="kv_head"),
    ]
    for name in gpus.names():
        arch = gpus.find(name)
        for spec in specs:
            plan = space.default_plan(spec, arch, "triton")
            assert space.why_invalid(plan, spec, arch) is None, (name, str(plan))


@pytest.mark.parametrize("head_dim", [64, 80, 96, 112, 128, 160, 192, 256])
@pytest.mark.parametrize("group", [1, 3, 8, 16])
def test_default_plans_of_every_head_dim_and_cache(head_dim: int, group: int) -> None:
    heads = HeadConfig(num_q_heads=2 * group, num_kv_heads=2, head_dim=head_dim, v_head_dim=128)
    reference = ScoreSpec(normaliser="reference", histogram=True)
    for cache, name, page_size in itertools.product(FLOAT8, ("a100", "l4", "b200", "mi300x"), (1, 880)):
        arch = gpus.find(name)
        spec = dataclasses.replace(VERIFY, heads=heads, kv_dtype=cache, page_size=page_size, score=reference)
        plan = space.default_plan(spec, arch, "triton")
        assert space.why_invalid(plan, spec, arch) is None
        sparse = dataclasses.replace(spec, op="sparse_attention", score=None, selection="layer")
        assert space.why_invalid(space.default_plan(sparse, arch, "triton"), sparse, arch) is None


@pytest.mark.parametrize(
    ("arch", "spec", "changes", "reason"),
    [
        ("h100", VERIFY, {"split_keys": 512}, "ctas_per_sm=2 has no say where split_keys=512 is fixed; use 1"),
        (
            "h100",
            VERIFY,
            {"merge": "fused", "split_keys": 512, "ctas_per_sm": 1},
            "split_keys=512 sets no bound; use merge",
        ),
        ("mi300x", VERIFY, {"merge": "fused"}, "mi300x Triton's barrier does not wait for stores"),
        ("a100", PAGE_64, {"kv_load": "descriptor"}, "a100 has no tensor memory accelerator; use kv_load=pointer"),
        ("mi300x", PAGE_64, {"kv_load": "descriptor"}, "mi300x has no tensor memory accelerator"),
        ("h100", VERIFY, {"kv_load": "descriptor"}, "page_size=16 is no multiple of block_n=64; use a block_n that"),
        ("h100", dataclasses.replace(PAGE_64, heads=ODD), {"kv_load": "descriptor"}, "head_dim=100 float8_e4m3"),
        ("l4", PAGE_64, {"float8": "native"}, "l4 has no instructions that every Triton uses here; use float8=bits"),
        (
            "h100",
            PAGE_64,
            {"block_m": 64, "num_warps": 4, "num_stages": 1},
            "registers a thread with their operands; more warps",
        ),
        ("h100", REFERENCE, {"score_method": "remat"}, "score_method=remat is not one of fused"),
        ("h100", LOGIT, {"score_method": "dump"}, "score_method=dump is not one of fused, remat"),
    ],
    ids=lambda value: value.name if isinstance(value, KernelSpec) else None,
)
def test_a_refusal_names_what_would_do(arch: str, spec: KernelSpec, changes: dict[str, Setting], reason: str) -> None:
    gpu = gpus.find(arch)
    plan = space.default_plan(spec, gpu, "triton").replace(**changes)
    assert reason in (space.why_invalid(plan, spec, gpu) or "")


def test_descriptors_serve_large_pages_on_hopper_and_later() -> None:
    for name in ("h100", "b200", "rtx5090"):
        plan = space.default_plan(PAGE_64, gpus.find(name), "triton").replace(kv_load="descriptor")
        assert space.why_invalid(plan, PAGE_64, gpus.find(name)) is None


@pytest.mark.parametrize(
    ("arch", "changes", "reason"),
    [
        ("l4", {"block_m": 64, "block_n": 128, "num_warps": 8, "num_stages": 4}, "bytes of shared memory"),
        ("h100", {"block_m": 64, "block_n": 128, "num_warps": 2, "num_stages": 1}, "registers a thread"),
        ("h100", {"block_m": 16, "block_n": 16, "num_warps": 8, "num_stages": 1}, "cannot share a tile"),
    ],
)
def test_hopeless_plans_are_refused_with_a_reason(arch: str, changes: dict[str, int], reason: str) -> None:
    gpu = gpus.find(arch)
    plan = space.default_plan(VERIFY, gpu, "triton").replace(**changes)
    assert reason in (space.why_invalid(plan, VERIFY, gpu) or "")


def test_float32_is_refused_where_scalar_products_spill() -> None:
    spec = KernelSpec(op="verify_attention", heads=LLAMA, dtype="float32", page_size=16)
    h100, mi300x = gpus.find("h100"), gpus.find("mi300x")
    large = space.default_plan(spec, h100, "triton").replace(block_m=32, block_n=32, num_warps=4, num_stages=1)
    assert "float32 products" in (space.why_invalid(large, spec, h100) or "")
    assert space.why_invalid(large, spec, mi300x) is None  # whose matrix cores multiply float32


def test_a_block_of_1024_threads_has_half_the_warps_on_amd() -> None:
    spec = KernelSpec(op="select_kv", heads=LLAMA, selection="layer")
    plan = space.default_plan(spec, gpus.find("h100"), "triton").replace(num_warps=32)
    assert space.why_invalid(plan, spec, gpus.find("h100")) is None
    assert "1024" in (space.why_invalid(plan, spec, gpus.find("mi300x")) or "")


def test_a_kernel_without_a_page_size_is_refused() -> None:
    spec = KernelSpec(op="verify_attention", heads=LLAMA, dtype="bfloat16")
    plan = space.default_plan(VERIFY, gpus.find("h100"), "triton")
    assert "page size" in (space.why_invalid(plan, spec, gpus.find("h100")) or "")


def test_head_dims_beyond_any_tile_are_refused() -> None:
    spec = KernelSpec(
        op="verify_attention",
        heads=HeadConfig(num_q_heads=8, num_kv_heads=8, head_dim=1024),
        dtype="float32",
        page_size=16,
    )
    with pytest.raises(SpecError, match="head_dim=1024"):
        space.default_plan(spec, gpus.find("mi300x"), "triton")


def test_a_second_pass_that_needs_too_much_shared_memory_is_refused() -> None:
    spec = KernelSpec(op="verify_attention", heads=GEMMA, dtype="bfloat16", page_size=16, score=ScoreSpec())
    gpu = gpus.find("l4")
    plan = space.default_plan(spec, gpu, "triton").replace(score_method="remat", score_block_n=256)
    assert "bytes of shared memory" in (space.why_invalid(plan, spec, gpu) or "")
    assert space.why_invalid(plan.replace(score_method="dump"), spec, gpu) is None


def test_every_axis_has_feasible_values() -> None:
    """Each value of each axis occurs in some valid plan, so that none is there for nothing."""
    spec = dataclasses.replace(PAGE_64, score=ScoreSpec())
    plans = list(space.feasible(spec, gpus.find("h100"), "triton"))
    for axis in space.axes(spec, "triton"):
        assert {plan[axis.name] for plan in plans} == set(axis.values), axis.name
