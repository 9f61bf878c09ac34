"""How the TileLang tests build the C twin of a kernel and run it."""

from __future__ import annotations

import functools

import torch

from specattn_codegen.build import tilelang_twin
from specattn_codegen.build.tilelang import AttentionKernel, SelectKernel
from specattn_codegen.calls import problem_call
from specattn_codegen.heads import HeadConfig
from specattn_codegen.kernel import AttentionCall
from specattn_codegen.plan import Plan, Setting
from specattn_codegen.proof.check import Verdict, check_attention
from specattn_codegen.proof.problems import AttentionProblem
from specattn_codegen.render import render
from specattn_codegen.space.triton import score_methods
from specattn_codegen.spec import KernelSpec, ScoreHeads, ScoreSpec

SMALL = HeadConfig(num_q_heads=4, num_kv_heads=2, head_dim=32)
SELECT = KernelSpec(op="select_kv", heads=SMALL, selection="kv_head")
SMS = 4  # multiprocessors the twin stands for: enough that small problems are split
MANY_SMS = 64  # enough that four blocks share a row of scores of several tiles


def verify_spec(heads: HeadConfig, score: ScoreSpec | None = None, page_size: int = 16) -> KernelSpec:
    return KernelSpec(op="verify_attention", heads=heads, dtype="float16", page_size=page_size, score=score)


def sparse_spec(heads: HeadConfig, selection: ScoreHeads = "kv_head") -> KernelSpec:
    return KernelSpec(op="sparse_attention", heads=heads, dtype="float16", page_size=16, selection=selection)


def mixed_spec(
    heads: HeadConfig, score: ScoreSpec | None = None, selection: ScoreHeads = "kv_head", page_size: int = 16
) -> KernelSpec:
    return KernelSpec(
        op="mixed_attention", heads=heads, dtype="float16", page_size=page_size, score=score, selection=selection
    )


def plan_for(spec: KernelSpec, **changes: Setting) -> Plan:
    """Small tiles, so that small problems have several."""
    settings: dict[str, Setting] = {
        "block_m": 16,
        "block_n": 32,
        "num_warps": 4,
        "num_stages": 2 if spec.op == "verify_attention" else 1,
        "ctas_per_sm": 8,
        "split_keys": 0,
    }
    if spec.op != "sparse_attention":
        settings |= {"kv_load": "pointer"}
    if spec.is_float8:
        settings |= {"float8": "bits"}
    if spec.score is not None:
        settings |= {"score_method": score_methods(spec.score)[0], "score_block_n": 64}
    return Plan.of("tilelang", **{**settings, **changes})


def twin(spec: KernelSpec, **changes: Setting) -> AttentionKernel:
    kernel = tilelang_twin.load(render(spec, plan_for(spec, **changes), "tilelang"), num_sms=SMS)
    assert isinstance(kernel, AttentionKernel)
    return kernel


@functools.cache
def select_twin(**changes: Setting) -> SelectKernel:
    """Tiles of two lines, so that short rows have several. Kept, as TileLang takes half a minute for it."""
    plan = Plan.of("tilelang", block_n=64, num_warps=1, radix_bits=8, max_splits=4).replace(**changes)
    kernel = tilelang_twin.load(render(SELECT, plan, "tilelang"), MANY_SMS)
    assert isinstance(kernel, SelectKernel)
    return kernel


def run(kernel: AttentionKernel, problem: AttentionProblem) -> AttentionCall:
    """Launches on a workspace of NaN bit patterns."""
    call = problem_call(kernel.spec, problem)
    kernel.launch(call, torch.full((kernel.workspace_bytes(call),), 0xFF, dtype=torch.uint8))
    return call


def verdict(kernel: AttentionKernel, problem: AttentionProblem) -> Verdict:
    call = run(kernel, problem)
    return check_attention(kernel.spec, problem, call.out, call.lse, call.scores, histogram=call.histogram)
