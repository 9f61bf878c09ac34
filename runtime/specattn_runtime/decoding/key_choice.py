"""Which prefix keys drafts read: rankings that need no model, shares of a budget, and budgets of each request's own."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from specattn_codegen.policy import TopK
from specattn_codegen.results import Selection
from specattn_runtime.kernels_protocol import AttentionKernels


def newest_first(batch: int, max_kv: int, device: torch.device) -> torch.Tensor:
    """Scores [B, 1, max_kv] that rank keys by position. Exact in float32 up to 2^24 keys."""
    return torch.arange(max_kv, dtype=torch.float32, device=device).repeat(batch, 1, 1)


def at_random(layers: int, prefix_lens: torch.Tensor, max_kv: int) -> torch.Tensor:
    """Scores [layers * B, 1, max_kv] without meaning: a hash of layer, prefix and position, so that they are new every
    round and a request's do not depend on its neighbours."""
    device = prefix_lens.device
    layer = torch.arange(layers, device=device)[:, None, None]
    bits = (layer << 56) + (prefix_lens.long()[:, None] << 28) + torch.arange(max_kv, device=device)
    for factor in (-0x61C8864680B583EB, -0x40A7B892E31B1A47):  # odd; products wrap around at 64 bits
        bits = bits * factor
        bits = bits ^ (bits >> 29)
    return (bits & 0xFFFFFF).float().view(-1, 1, max_kv)


def force_recents(
    scores: torch.Tensor, prefixes: Sequence[int], policies: Sequence[TopK | None], share: float
) -> torch.Tensor:
    """scores [layers * B, S, N] with each request's newest prefix keys above all others, as many as fill `share` of its
    budget, rounded up. Writes to scores."""
    by_layer = scores.unflatten(0, (-1, len(prefixes)))
    for request, (prefix, policy) in enumerate(zip(prefixes, policies, strict=True)):
        recents = 0 if policy is None else math.ceil(share * policy.budget(prefix))
        by_layer[:, request, :, prefix - recents : prefix] = math.inf
    return scores


def look_ahead(scores: torch.Tensor, requests: int, ahead: int) -> torch.Tensor:
    """scores [layers * requests, S, N] -> each key's best score among itself and the `ahead` keys before it: a text
    that is repeated goes on behind what was looked at. Writes to scores."""
    for layer in scores.split(requests):  # a layer's scores stay in a cache from one step to the next
        reach = 0
        while reach < ahead:
            step = min(reach + 1, ahead - reach)
            layer[..., step:] = torch.maximum(layer[..., step:], layer[..., :-step])
            reach += step
    return scores


def select_by_policy(
    kernels: AttentionKernels,
    scores: torch.Tensor,
    prefix_lens: torch.Tensor,
    policies: Sequence[TopK | None],
    *,
    sink: int,
    recent: int,
    block: int = 1,
) -> Selection:
    """scores [layers * B, S, N] and prefix_lens [B] -> indices [layers * B, S, K]: each request by its own policy.

    Nothing is selected for a request whose policy is None. Requests that share a policy share a launch.
    """
    parts = [Selection(*_nothing(scores), block)]
    for policy in dict.fromkeys(policy for policy in policies if policy is not None):
        mine = torch.tensor([other == policy for other in policies], device=prefix_lens.device)
        lengths = torch.where(mine, prefix_lens, 0).repeat(len(scores) // len(prefix_lens))
        parts.append(kernels.select_kv(scores, lengths, policy, sink=sink, recent=recent, block=block))
    if len(parts) <= 2:
        return parts[-1]
    # A row belongs to one policy; the others left it empty.
    indices = torch.stack(padded([part.indices for part in parts])).amax(dim=0)
    return Selection(indices, torch.stack([part.counts for part in parts]).sum(dim=0, dtype=torch.int32), block)


def _nothing(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices [..., 1] and counts [...] of an empty selection out of scores [..., N]."""
    counts = torch.zeros(scores.shape[:-1], dtype=torch.int32, device=scores.device)
    return counts[..., None] - 1, counts


def padded(indices: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Selected indices [..., K], filled up with -1 to the widest K."""
    width = max(some.shape[-1] for some in indices)
    return [torch.nn.functional.pad(some, (0, width - some.shape[-1]), value=-1) for some in indices]
