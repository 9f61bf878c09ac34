"""Next-token distributions as a request wants them, and draws from them. Knows logits, not where they come from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from specattn_codegen.errors import SpecError


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How a request's tokens are chosen. The restrictions apply in the order of the fields.

    temperature  divides the logits; 0 takes the most likely token, whatever the other fields say
    top_k        only the k most likely tokens, the smaller id first among equals; None for all
    top_p        only the fewest most likely tokens that together have this share of the mass
    seed         of the request's own random numbers: the same text every time, whatever else is in the batch
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0.0):
            raise SpecError(f"temperature={self.temperature}: must be 0, for the most likely token, or above; try 0.6")
        if self.top_k is not None and self.top_k < 1:
            raise SpecError(f"top_k={self.top_k}: must be at least 1 token; leave it out to keep all")
        if not 0.0 < self.top_p <= 1.0:
            raise SpecError(f"top_p={self.top_p}: must be above 0 and at most 1, a share of the mass; 1 keeps all")
        if not -(2**63) <= self.seed < 2**64:
            raise SpecError(f"seed={self.seed}: must fit in 64 bits")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


GREEDY = Sampling()


def token_probabilities(logits: torch.Tensor, samplings: Sequence[Sampling]) -> torch.Tensor:
    """logits [N, V] of rows that are sampled as `samplings` [N] say -> what each draws from [N, V].

    At least float32; each row sums to 1 up to rounding. A greedy row has all its mass on the first of the largest.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    temperatures = wide.new_tensor([sampling.temperature or 1.0 for sampling in samplings])[:, None]
    # Below the largest before dividing, so that no temperature overflows.
    scaled = (wide - wide.amax(dim=1, keepdim=True)) / temperatures
    restricted = any(sampling.top_k is not None or sampling.top_p < 1.0 for sampling in samplings)
    found = _restricted(scaled, samplings) if restricted else scaled.softmax(dim=1)
    greedy = torch.tensor([sampling.greedy for sampling in samplings], device=logits.device)[:, None]
    best = torch.zeros_like(found).scatter_(1, logits.argmax(dim=1, keepdim=True), 1.0)
    return torch.where(greedy, best, found)


def _restricted(scaled: torch.Tensor, samplings: Sequence[Sampling]) -> torch.Tensor:
    """The softmax of scaled [N, V] over each row's top-k, then over the top-p of that."""
    vocab_size = scaled.shape[1]
    kept = torch.tensor([sampling.top_k or vocab_size for sampling in samplings], device=scaled.device)[:, None]
    shares = torch.tensor([sampling.top_p for sampling in samplings], dtype=torch.float64, device=scaled.device)
    ordered, tokens = scaled.sort(dim=1, descending=True, stable=True)
    ordered = ordered.masked_fill(torch.arange(vocab_size, device=scaled.device) >= kept, -math.inf)
    mass = ordered.softmax(dim=1)
    wide = mass.double()
    before = wide.cumsum(dim=1) - wide
    mass = mass.masked_fill((before >= shares[:, None]) & (shares[:, None] < 1.0), 0.0)
    return torch.zeros_like(mass).scatter_(1, tokens, mass / mass.sum(dim=1, keepdim=True))


def draw(weights: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """weights [..., V], not negative and not all 0, and uniforms [...] float64 in [0, 1) -> token ids [...].

    Weights need not sum to 1. A token of weight 0 is never drawn.
    """
    edges = weights.double().cumsum(dim=-1)
    # The first edge above the mark: a token without weight shares its edge with the one before.
    return torch.searchsorted(edges, (uniforms * edges[..., -1])[..., None], right=True)[..., 0]
