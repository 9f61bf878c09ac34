"""Thresholds from sample scores: what each head must reach so that on average it selects what a budget allows."""

from __future__ import annotations

import math

import torch

from specattn_codegen.errors import SpecError
from specattn_codegen.policy import Threshold, TopK, blocks_of


def calibrate_thresholds(
    scores: torch.Tensor,
    prefix_lens: torch.Tensor,
    budget: TopK,
    *,
    sink: int = 0,
    recent: int = 0,
    block: int = 1,
) -> Threshold:
    """Top-Theta's calibration (arXiv 2502.08363): sample scores [B, S, N] and prefix_lens [B] -> a threshold per head.

    Each head's threshold is the largest with which select_kv, given the same sink, recent and block, selects as many
    keys of the whole sample as `budget` would. Single prefixes then get more or fewer, as their scores are spread. With
    layers, scores [L, B, S, N], every layer has thresholds of its own. Weights of a softmax shrink as prefixes grow, so
    a sample should have prefixes of the lengths that are to come. A threshold is -inf where the budget takes all keys
    and inf where the forced ones use it up.
    Raises SpecError for a sample without requests.
    """
    if scores.dim() not in (3, 4) or prefix_lens.shape != scores.shape[-3:-2] or len(prefix_lens) == 0:
        raise SpecError(
            f"scores {tuple(scores.shape)}, prefix_lens {tuple(prefix_lens.shape)}: must be [B, S, N] or [L, B, S, N] "
            "and [B], with at least 1 request"
        )
    wanted, free = 0, []
    first_keys = torch.arange(scores.shape[-1], device=scores.device) * block
    for request, length in enumerate(prefix_lens.tolist()):
        prefix = max(0, min(length, scores.shape[-1] * block))
        forced = (first_keys < sink) | ((first_keys + block > prefix - recent) & (recent > 0))
        inside = first_keys < prefix
        free.append(scores.select(-3, request)[..., inside & ~forced])
        wanted += max(0, blocks_of(budget.budget(prefix), block) - int((inside & forced).sum()))
    pooled = torch.cat(free, dim=-1).nan_to_num(nan=-math.inf, posinf=math.inf, neginf=-math.inf)  # [(L,) S, keys]
    if wanted == 0:
        values = pooled.new_full(pooled.shape[:-1], math.inf)
    elif wanted >= pooled.shape[-1]:
        values = pooled.new_full(pooled.shape[:-1], -math.inf)
    else:
        values = pooled.topk(wanted, dim=-1).values[..., -1]
    return Threshold(values if scores.dim() == 3 else values[:, None])
