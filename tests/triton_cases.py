"""How the Triton tests build a kernel and run it: in the interpreter, or on a GPU where there is one."""

from __future__ import annotations

import dataclasses

import torch

from specattn_codegen.build import triton
from specattn_codegen.calls import problem_call
from specattn_codegen.heads import HeadConfig
from specattn_codegen.kernel import AttentionCall
from specattn_codegen.plan import Plan, Setting
from specattn_codegen.proof.check import Verdict, check_attention
from specattn_codegen.proof.problems import AttentionProblem
from specattn_codegen.render import render
from specattn_codegen.space.triton import merges_last, score_methods
from specattn_codegen.spec import Dtype, KernelSpec, KvDtype, ScoreHeads, ScoreSpec

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SMALL = HeadConfig(num_q_heads=4, num_kv_heads=2, head_dim=32)


def verify_spec(
    heads: HeadConfig,
    score: ScoreSpec | None = None,
    dtype: Dtype = "float16",
    page_size: int = 16,
    kv_dtype: KvDtype | None = None,
) -> KernelSpec:
    return KernelSpec(
        op="verify_attention", heads=heads, dtype=dtype, kv_dtype=kv_dtype, page_size=page_size, score=score
    )


def sparse_spec(
    heads: HeadConfig,
    selection: ScoreHeads = "kv_head",
    dtype: Dtype = "float16",
    page_size: int = 16,
    kv_dtype: KvDtype | None = None,
) -> KernelSpec:
    return KernelSpec(
        op="sparse_attention", heads=heads, dtype=dtype, kv_dtype=kv_dtype, page_size=page_size, selection=selection
    )


def plan_for(spec: KernelSpec, **changes: Setting) -> Plan:
    """Small tiles, so that small problems have several."""
    settings: dict[str, Setting] = {
        "block_m": 16,
        "block_n": 32,
        "num_warps": 4,
        "num_stages": 2,
        "ctas_per_sm": 8,
        "split_keys": 0,
    }
    if spec.op != "sparse_attention":
        settings |= {"kv_load": "pointer", "merge": "separate"}
    if spec.is_float8:
        settings |= {"float8": "bits"}
    if spec.score is not None:
        settings |= {"score_method": score_methods(spec.score)[0], "score_block_n": 32}
    return Plan.of("triton", **{**settings, **changes})


def attention_kernel(spec: KernelSpec, **changes: Setting) -> triton.AttentionKernel:
    kernel = triton.load(render(spec, plan_for(spec, **changes), "triton"))
    assert isinstance(kernel, triton.AttentionKernel)
    return kernel


def _on_device(tensor: torch.Tensor) -> torch.Tensor:
    """A copy with the same strides, gaps included."""
    if DEVICE.type == "cpu":
        return tensor
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=DEVICE).copy_(tensor)


def call_of(spec: KernelSpec, problem: AttentionProblem) -> AttentionCall:
    call = problem_call(spec, problem)
    moved = {
        field.name: _on_device(value)
        for field in dataclasses.fields(call)
        if isinstance(value := getattr(call, field.name), torch.Tensor)
    }
    return dataclasses.replace(call, **moved)


def run(kernel: triton.AttentionKernel, problem: AttentionProblem, num_sms: int | None = None) -> AttentionCall:
    """Launches on a workspace of NaN bit patterns; `num_sms` stands for a smaller or larger device."""
    call = call_of(kernel.spec, problem)
    sms = triton.num_sms(DEVICE) if num_sms is None else num_sms
    size = kernel.module.workspace_bytes(
        total_q=call.q.shape[0], batch=call.batch, max_q=call.max_q, max_kv=call.max_kv, num_sms=sms
    )
    workspace = torch.full((size,), 0xFF, dtype=torch.uint8, device=DEVICE)
    arguments = {name: getattr(call, name) for name in kernel.arguments}
    if merges_last(kernel.plan):
        arguments["arrivals"] = torch.zeros(kernel.module.num_arrivals(sms), dtype=torch.int32, device=DEVICE)
    kernel.module.launch(**arguments, workspace=workspace, num_sms=sms)
    return call


def verdict(kernel: triton.AttentionKernel, problem: AttentionProblem, num_sms: int | None = None) -> Verdict:
    call = run(kernel, problem, num_sms)
    return check_attention(kernel.spec, problem, call.out, call.lse, call.scores, histogram=call.histogram)
