"""Loading rendered Triton, and that a launch and what a cross-compiler is told cannot drift apart."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import pytest
import torch
import triton.language as tl
import triton.runtime
from triton.runtime.interpreter import InterpretedFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from specattn_codegen import paths
from specattn_codegen.build import triton as build_triton
from specattn_codegen.errors import BuildError
from specattn_codegen.kernel import SelectCall
from specattn_codegen.plan import Plan, Setting
from specattn_codegen.policy import TopK
from specattn_codegen.proof.problems import attention_problem
from specattn_codegen.render import Source, render
from specattn_codegen.space.triton import merges_last
from specattn_codegen.spec import KernelSpec, ScoreSpec
from triton_cases import DEVICE, SMALL, attention_kernel, plan_for, run, sparse_spec, verify_spec

POINTERS = {
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int32: "*i32",
    torch.uint8: "*u8",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.float8_e5m2: "*fp8e5",
}
SELECT = KernelSpec(op="select_kv", heads=SMALL, selection="kv_head")
REFERENCE = ScoreSpec(normaliser="reference")
SPECS: dict[str, tuple[KernelSpec, dict[str, Setting]]] = {
    "plain": (verify_spec(SMALL), {}),
    "remat": (verify_spec(SMALL, ScoreSpec()), {"score_method": "remat"}),
    "dump": (verify_spec(SMALL, ScoreSpec(rows="ends")), {"score_method": "dump"}),
    "logit": (verify_spec(SMALL, ScoreSpec(value="logit")), {"score_method": "remat"}),
    "reference, one tile": (verify_spec(SMALL, REFERENCE), {"block_m": 64}),
    "reference, several tiles": (verify_spec(SMALL, REFERENCE), {}),
    "histogram": (verify_spec(SMALL, ScoreSpec(histogram=True, granularity="page_max")), {"score_method": "dump"}),
    "fixed splits": (verify_spec(SMALL), {"split_keys": 512}),
    "descriptors": (verify_spec(SMALL, REFERENCE), {"kv_load": "descriptor", "block_n": 16}),
    "float8": (verify_spec(SMALL, ScoreSpec(), kv_dtype="float8_e4m3"), {"float8": "native"}),
    "float8 bits": (verify_spec(SMALL, kv_dtype="float8_e5m2"), {"kv_load": "descriptor", "block_n": 16}),
    "last block merges": (verify_spec(SMALL, ScoreSpec(histogram=True)), {"merge": "fused"}),
    "sparse": (sparse_spec(SMALL), {}),
    "sparse float8": (sparse_spec(SMALL, kv_dtype="float8_e5m2"), {"float8": "native", "split_keys": 512}),
}


def _select_call() -> SelectCall:
    return SelectCall(
        scores=torch.zeros(1, 2, 8, device=DEVICE),
        prefix_lens=torch.tensor([8], dtype=torch.int32, device=DEVICE),
        policy=TopK(k=4),
        sink=0,
        recent=0,
        indices=torch.zeros(1, 2, 4, dtype=torch.int32, device=DEVICE),
        counts=torch.zeros(1, 2, dtype=torch.int32, device=DEVICE),
    )


class Launch(NamedTuple):
    """What a launch was given, instead of its execution."""

    function: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: dict[str, Any]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    launches: list[Launch] = []

    def record(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:  # noqa: ARG001
        launches.append(Launch(kernel, grid, args, options))

    monkeypatch.setattr(InterpretedFunction, "run", record)
    monkeypatch.setattr(triton.runtime.JITFunction, "run", record)
    return launches


def _types_agree(annotation: object, argument: object) -> bool:
    if isinstance(argument, torch.Tensor):
        return annotation == POINTERS[argument.dtype]
    if isinstance(argument, TensorDescriptor):
        return annotation == f"tensordesc<{POINTERS[argument.base.dtype][1:]}{argument.block_shape}>"
    if isinstance(argument, float):
        return annotation in ("fp32", "fp64")
    return isinstance(argument, int) and annotation in ("i32", "i64", tl.constexpr)


@pytest.mark.parametrize("name", [*SPECS, "select"])
def test_launches_are_what_the_cross_compiler_compiles(name: str, launched: list[Launch]) -> None:
    if name == "select":
        plan = Plan.of("triton", block_n=1024, num_warps=4, radix_bits=8, max_splits=1)
        kernel = build_triton.load(render(SELECT, plan, "triton"))
        call = _select_call()
        kernel.launch(call, torch.empty(kernel.workspace_bytes(call), dtype=torch.uint8, device=DEVICE))
    else:
        spec, changes = SPECS[name]
        kernel = attention_kernel(spec, **changes)
        problem = attention_problem(spec, q_lens=[9], kv_lens=[40], page_size=16, seed=0, budget=8)
        run(kernel, problem)
    functions = [launch.function for launch in launched]
    # One tile of rows writes its scores itself, and nothing is united unless it is asked for.
    needed = {"reference, one tile": 2, "select": 1}
    assert functions == list(kernel.module.KERNELS)[: needed.get(name)]
    for launch in launched:
        assert launch.options == kernel.module.KERNELS[launch.function]
        annotations = launch.function.fn.__annotations__
        assert len(launch.arguments) == len(annotations)
        for parameter, argument in zip(annotations, launch.arguments, strict=True):
            assert _types_agree(annotations[parameter], argument), (launch.function.__name__, parameter)


@pytest.mark.parametrize(
    "name", ["remat", "histogram", "reference, several tiles", "fixed splits", "last block merges", "sparse"]
)
def test_grids_hold_more_requests_than_one_of_their_axes(name: str, launched: list[Launch]) -> None:
    """Only the first axis of a grid may pass 65,535: here 70,000 requests, without their memory."""
    batch, max_kv = 70_000, 2**17
    spec, changes = SPECS[name]
    kernel = attention_kernel(spec, **changes)
    sizes = {"batch": batch, "max_q": 9, "max_kv": max_kv, "num_sms": 132}
    columns = spec.score.columns(max_kv, 16) if spec.score else 0
    shapes = {
        "q": ((9 * batch, 4, 32), torch.float16),
        "k_cache": ((9, 16, 2, 32), torch.float16),
        "v_cache": ((9, 16, 2, 32), torch.float16),
        "page_table": ((batch, max_kv // 16), torch.int32),
        "kv_lens": ((batch,), torch.int32),
        "cu_q": ((batch + 1,), torch.int32),
        "lse_ref": ((9 * batch, 4), torch.float32),
        "out": ((9 * batch, 4, 32), torch.float16),
        "lse": ((9 * batch, 4), torch.float32),
        "scores": ((batch, 2, columns), torch.float32),
        "histogram": ((batch, 2, 1024), torch.int32),
        "indices": ((batch, 2, 100), torch.int32),
        "counts": ((batch, 2), torch.int32),
        "tail_start": ((batch,), torch.int32),
        "workspace": ((kernel.module.workspace_bytes(total_q=9 * batch, **sizes),), torch.uint8),
    }
    wanted = {*kernel.arguments, "workspace"}
    tensors = {
        argument: torch.empty(shape, dtype=dtype, device="meta")
        for argument, (shape, dtype) in shapes.items()
        if argument in wanted
    }
    numbers = {"block": 1, "slots": None} if "block" in wanted else {}
    if merges_last(kernel.plan):
        tensors["arrivals"] = torch.empty(kernel.module.num_arrivals(132), dtype=torch.int32, device="meta")
    kernel.module.launch(**tensors, **numbers, max_q=9, max_kv=max_kv, num_sms=132)
    assert len(launched) == len(kernel.module.KERNELS)
    for launch in launched:
        first, *others = launch.grid
        assert batch <= first < 2**31
        assert all(extent <= 65_535 for extent in others)


def test_a_source_is_imported_from_the_cache_once() -> None:
    source = render(verify_spec(SMALL), plan_for(verify_spec(SMALL)), "triton")
    first, second = build_triton.import_source(source), build_triton.import_source(source)
    assert first is second
    folder = paths.cache_dir() / "kernels" / "triton" / source.digest
    assert (folder / "verify_attention.py").read_text() == source.text


def test_rendering_is_deterministic_and_plans_differ_in_their_digests() -> None:
    spec = verify_spec(SMALL, ScoreSpec())
    digests: dict[str, Source] = {}
    for block_m, method in itertools.product((16, 32), ("remat", "dump")):
        plan = plan_for(spec, block_m=block_m, score_method=method)
        source = render(spec, plan, "triton")
        assert source.text == render(spec, plan, "triton").text
        digests[source.digest] = source
    assert len(digests) == 4


def test_a_machine_without_gpu_or_interpreter_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(build_triton, "is_interpreted", lambda: False)
    with pytest.raises(BuildError, match="--backend cpu"):
        build_triton.load(render(verify_spec(SMALL), plan_for(verify_spec(SMALL)), "triton"))


def test_an_interpreter_that_numpy_broke_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_triton, "is_interpreted", lambda: True)
    monkeypatch.setattr(build_triton.triton, "__version__", "3.6.0")
    monkeypatch.setattr(build_triton.np, "__version__", "2.4.6")
    with pytest.raises(BuildError, match=r"numpy<2\.4"):
        build_triton.load(render(verify_spec(SMALL), plan_for(verify_spec(SMALL)), "triton"))


def test_kernels_refuse_the_call_of_another_operation() -> None:
    kernel = attention_kernel(verify_spec(SMALL))
    with pytest.raises(TypeError, match="AttentionCall"):
        kernel.launch(_select_call(), torch.empty(0, dtype=torch.uint8))
    with pytest.raises(TypeError, match="AttentionCall"):
        kernel.workspace_bytes(_select_call())


def test_workspace_is_sized_by_rows_and_splits() -> None:
    kernel = attention_kernel(verify_spec(SMALL))
    sizes = {"batch": 3, "max_q": 5, "max_kv": 4096}
    one = kernel.module.workspace_bytes(total_q=15, num_sms=1, **sizes)
    many = kernel.module.workspace_bytes(total_q=15, num_sms=50, **sizes)
    splits = kernel.module.num_splits(3, 5, 4096, 50)
    assert splits == 8 * 50 // (1 * 2 * 3)  # ctas_per_sm * SMs over tiles of rows, KV heads and requests
    partial = 15 * 4 * 32 * 4  # rows, heads, value dim, float32
    assert one >= partial
    assert partial * splits <= many <= (partial + 15 * 4 * 4) * splits + 2 * 256
