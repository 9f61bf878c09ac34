"""Which drafts survive verification. Knows token ids only."""

from __future__ import annotations

import torch


def accept_greedy(drafts: torch.Tensor, targets: torch.Tensor, draft_lens: torch.Tensor) -> torch.Tensor:
    """How many leading drafts of each request equal what the full model says at their place: [B] int64.

    drafts [B, k] and targets [B, k + 1] are token ids, draft_lens [B] how many of a request's drafts count.
    targets[b, i] is the full model's choice after the newest emitted token and i drafts, so a round emits
    `targets[b, : accepted[b] + 1]`: the accepted drafts, then the correction of the first wrong one or, when none is
    wrong, one token more. Decoding densely emits the same.
    """
    counted = torch.arange(drafts.shape[1], device=drafts.device) < draft_lens[:, None]
    agrees = (drafts == targets[:, : drafts.shape[1]]) & counted
    return agrees.long().cumprod(dim=1).sum(dim=1)
