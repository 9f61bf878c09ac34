"""Selection by torch's own operations. Each peer gives, for a row of scores, the indices that it selects, in any order;
what a rule selects is decided inside the timing."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from specattn_bench.selection_series import BISECTED, Rule
from specattn_codegen.policy import Threshold, TopK, TopP, blocks_of

# Scores [.., N] to what is selected: indices [.., K] of which the first counts [..] do, or a list of every one's place.
Chosen = tuple[torch.Tensor, torch.Tensor] | tuple[torch.Tensor, ...]
Peer = Callable[[torch.Tensor], Chosen]
SORT = "torch.sort"


def _budget(rule: Rule, scores: torch.Tensor) -> int:
    return blocks_of(rule.policy.most_keys(scores.shape[-1] * rule.block), rule.block)


def top_k(rule: Rule) -> Mapping[str, Peer]:
    def counted(indices: torch.Tensor) -> Chosen:
        return indices, torch.full(indices.shape[:-1], indices.shape[-1])

    return {
        "torch.topk": lambda scores: counted(scores.topk(_budget(rule, scores)).indices),
        "torch.topk, unsorted": lambda scores: counted(scores.topk(_budget(rule, scores), sorted=False).indices),
        SORT: lambda scores: counted(scores.sort(descending=True).indices[..., : _budget(rule, scores)]),
    }


def _until(share: float, values: torch.Tensor, mass: torch.Tensor) -> torch.Tensor:
    """How many of `values`, from large to small, hold the share of the mass."""
    return (values.cumsum(-1) < share * mass).sum(-1) + 1


def sorted_mass(share: float, scores: torch.Tensor) -> Chosen:
    values, indices = scores.sort(descending=True)
    return indices, _until(share, values, scores.sum(-1, keepdim=True))


def top_eighth_mass(share: float, scores: torch.Tensor) -> Chosen:
    """Sorts an eighth of the row, and all of it where that does not hold the mass."""
    values, indices = scores.topk(scores.shape[-1] // 8)
    counts = _until(share, values, scores.sum(-1, keepdim=True))
    return sorted_mass(share, scores) if bool((counts > indices.shape[-1]).any()) else (indices, counts)


def bisected_mass(share: float, scores: torch.Tensor) -> Chosen:
    low, high = torch.zeros_like(scores[..., :1]), scores.amax(-1, keepdim=True)
    needed = share * scores.sum(-1, keepdim=True)
    for _ in range(BISECTED):
        middle = 0.5 * (low + high)
        holds = torch.where(scores >= middle, scores, 0.0).sum(-1, keepdim=True) >= needed
        low, high = torch.where(holds, middle, low), torch.where(holds, high, middle)
    return (scores >= low).nonzero(as_tuple=True)


def peers_of(rule: Rule) -> Mapping[str, Peer]:
    policy = rule.policy
    if isinstance(policy, TopK):
        return top_k(rule)
    if isinstance(policy, TopP):
        return {
            f"{SORT}, cumsum": lambda scores: sorted_mass(policy.p, scores),
            "torch.topk of an eighth, cumsum": lambda scores: top_eighth_mass(policy.p, scores),
            f"bisection in torch, {BISECTED} steps": lambda scores: bisected_mass(policy.p, scores),
        }
    return {"compare, nonzero": lambda scores: (scores >= _value(policy)).nonzero(as_tuple=True)}


def _value(policy: Threshold) -> float:
    assert isinstance(policy.value, float), "rules have one threshold for all rows"
    return policy.value
