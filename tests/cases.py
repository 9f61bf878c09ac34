"""What the kernel tests share: head configurations, score definitions, ragged batches, and how to run a CPU kernel."""

from __future__ import annotations

import dataclasses
from typing import get_args

import torch

from specattn_codegen import build, space
from specattn_codegen.build import cpu
from specattn_codegen.calls import problem_call
from specattn_codegen.heads import HeadConfig
from specattn_codegen.kernel import AttentionCall, Kernel
from specattn_codegen.plan import Setting
from specattn_codegen.processors import cpu_info
from specattn_codegen.proof.check import Verdict, check_attention
from specattn_codegen.proof.problems import AttentionProblem
from specattn_codegen.render import render
from specattn_codegen.spec import Dtype, KernelSpec, ScoreHeads, ScoreRows, ScoreSpec

# Llama 3 8B, Qwen2.5 7B, Qwen3 14B, a tiny GQA, an MHA, an odd MQA (Falcon 7B) and a head dim that is no power of two.
HEADS = {
    (q, kv, dim): HeadConfig(num_q_heads=q, num_kv_heads=kv, head_dim=dim)
    for q, kv, dim in [(32, 8, 128), (28, 4, 128), (40, 8, 128), (8, 2, 32), (12, 12, 64), (71, 1, 64), (24, 8, 80)]
}
SMALL = HeadConfig(num_q_heads=8, num_kv_heads=2, head_dim=32)

# (query rows, keys, page size): no rows, no keys, padding, rows before every key, one key, and up to 3,000 keys.
RAGGED = [
    ([5, 1, 2, 9], [3000, 1, 700, 9], 16),
    ([2, 0, 5, 1, 4], [130, 40, 3, -1, 0], 1),
    ([9, 1, 1], [1025, 64, 1000], 64),
]

SCORES = [
    *(ScoreSpec(rows=rows, heads=heads) for rows in get_args(ScoreRows) for heads in get_args(ScoreHeads)),
    *(ScoreSpec(rows=rows, value="logit", granularity="page_max") for rows in get_args(ScoreRows)),
    ScoreSpec(value="logit", heads="layer"),
    ScoreSpec(rows="ends", heads="layer", granularity="page_mean", histogram=True),
    ScoreSpec(granularity="page_max", histogram=True),
    ScoreSpec(normaliser="reference"),
    ScoreSpec(normaliser="reference", rows="last", heads="layer", histogram=True),
    ScoreSpec(normaliser="reference", rows="ends", granularity="page_mean"),
    ScoreSpec(normaliser="reference", heads="layer", granularity="page_max", histogram=True),
]


def kernel_for(
    spec: KernelSpec,
    target: str | None = None,
    changes: dict[str, Setting] | None = None,
    *,
    batch_invariant: bool = False,
) -> cpu.CpuKernel:
    arch = dataclasses.replace(cpu_info.detect(measure=False), target=target or cpu_info.instruction_set())
    plan = space.default_plan(spec, arch, "cpu").replace(**(changes or {}))
    plan = space.batch_invariant(plan) if batch_invariant else plan
    assert space.why_invalid(plan, spec, arch) is None
    return cpu.load(render(spec, plan, build.target_for(plan, arch)))


def verify_spec(heads: HeadConfig, dtype: Dtype = "float32", score: ScoreSpec | None = None) -> KernelSpec:
    return KernelSpec(op="verify_attention", heads=heads, dtype=dtype, score=score)


def poisoned(byte_count: int) -> torch.Tensor:
    """A workspace full of NaN bit patterns, as a caller's uninitialised memory may be."""
    return torch.full((byte_count,), 0xFF, dtype=torch.uint8)


def run(kernel: Kernel, problem: AttentionProblem) -> AttentionCall:
    call = problem_call(kernel.spec, problem)
    kernel.launch(call, poisoned(kernel.workspace_bytes(call)))
    return call


def verdict(kernel: Kernel, problem: AttentionProblem) -> Verdict:
    call = run(kernel, problem)
    return check_attention(kernel.spec, problem, call.out, call.lse, call.scores, histogram=call.histogram)
