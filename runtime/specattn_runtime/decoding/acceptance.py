"""Which drafts survive verification, and what comes after them. Knows token ids and probabilities only."""

from __future__ import annotations

from typing import NamedTuple

import torch

from specattn_runtime.decoding.sampling import draw


class Accepted(NamedTuple):
    """counts [B] int64: leading drafts that hold; following [B] int64: the token a round emits after them."""

    counts: torch.Tensor
    following: torch.Tensor


def accept_greedy(drafts: torch.Tensor, targets: torch.Tensor, draft_lens: torch.Tensor) -> torch.Tensor:
    """How many leading drafts of each request equal what the full model says at their place: [B] int64.

    drafts [B, k] and targets [B, k + 1] are token ids, draft_lens [B] how many of a request's drafts count.
    targets[b, i] is the full model's choice after the newest emitted token and i drafts, so a round emits
    `targets[b, : accepted[b] + 1]`: the accepted drafts, then the correction of the first wrong one or, when none is
    wrong, one token more. Decoding densely emits the same.
    """
    return _leading(drafts == targets[:, : drafts.shape[1]], draft_lens)


def accept_sampled(
    drafts: torch.Tensor,
    draft_probabilities: torch.Tensor,
    target_probabilities: torch.Tensor,
    draft_lens: torch.Tensor,
    uniforms: torch.Tensor,
) -> Accepted:
    """Rejection sampling: what a round emits has the distribution of sampling from the full model, exactly.

    drafts [B, k] were drawn from draft_probabilities [B, k, V]; target_probabilities [B, k + 1, V] are the full model's
    after the newest emitted token and each draft; uniforms [B, k + 1] float64 in [0, 1), of which the last decides
    what follows. A draft of probability p holds with probability min(1, q / p), q being the full model's. The first
    that does not is replaced by a draw from the residual; where all hold, a draw from the full model follows.
    With all mass on one token each it is accept_greedy. (Leviathan et al., arXiv 2211.17192, section 2.3)
    """
    draft_len = drafts.shape[1]
    places = drafts[..., None]
    wanted = target_probabilities[:, :draft_len].gather(2, places)[..., 0]
    offered = draft_probabilities.gather(2, places)[..., 0]
    counts = _leading(uniforms[:, :draft_len] * offered.double() < wanted.double(), draft_lens)
    requests = torch.arange(len(drafts), device=drafts.device)
    weights = target_probabilities[requests, counts]
    if draft_len:
        refused = draft_probabilities[requests, counts.clamp_max(draft_len - 1)]
        weights = torch.where((counts < draft_lens)[:, None], residual(weights, refused), weights)
    return Accepted(counts, draw(weights, uniforms[:, draft_len]))


def residual(target: torch.Tensor, draft: torch.Tensor) -> torch.Tensor:
    """Weights [..., V] of what replaces a refused draft: what the target has above the draft, not normalised.

    draft * min(1, target / draft) + residual = target, so that acceptance and replacement together give the target.
    Where rounding leaves nothing above the draft the two are equal, and the weights are the target itself.
    """
    above = (target - draft).clamp_min(0.0)
    return torch.where(above.sum(dim=-1, keepdim=True) > 0.0, above, target)


def _leading(holds: torch.Tensor, draft_lens: torch.Tensor) -> torch.Tensor:
    """holds [B, k] bool -> how many hold before the first that does not, of the draft_lens [B] that count."""
    counted = torch.arange(holds.shape[1], device=holds.device) < draft_lens[:, None]
    return (holds & counted).long().cumprod(dim=1).sum(dim=1)
