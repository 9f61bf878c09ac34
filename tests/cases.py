"""Shapes that the kernel tests share: head configurations, ragged batches, and how to run one kernel on a problem."""

from __future__ import annotations

import torch

from specattn_codegen.calls import problem_call
from specattn_codegen.check import Verdict, check_attention
from specattn_codegen.heads import HeadConfig
from specattn_codegen.kernel import AttentionCall, Kernel
from specattn_codegen.problems import AttentionProblem

# Llama 3 8B, Qwen2.5 7B, Qwen3 14B, a tiny GQA, an MHA, an odd MQA (Falcon 7B) and a head dim that is no power of two.
HEADS = {
    (q, kv, dim): HeadConfig(num_q_heads=q, num_kv_heads=kv, head_dim=dim)
    for q, kv, dim in [(32, 8, 128), (28, 4, 128), (40, 8, 128), (8, 2, 32), (12, 12, 64), (71, 1, 64), (24, 8, 80)]
}

# (query rows, keys, page size): no rows, no keys, padding, rows before every key, one key, and up to 3,000 keys.
RAGGED = [
    ([5, 1, 2, 9], [3000, 1, 700, 9], 16),
    ([2, 0, 5, 1, 4], [130, 40, 3, -1, 0], 1),
    ([9, 1, 1], [1025, 64, 1000], 64),
]


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
