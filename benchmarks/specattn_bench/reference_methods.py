"""Ways to score the keys a verification saw, exact and approximate, from one request's logits in one layer."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

SPLIT_KEYS = 1024  # keys whose largest weight an 8-bit dump counts from
LINEAR_CODES = 255
LOG_CODES, LOG_OCTAVES = 254, 16  # codes 1 .. 255 over 16 octaves below the largest; 0 is nothing


@dataclass(frozen=True, slots=True, kw_only=True)
class RowLses:
    """Log-sum-exps of a round's rows in one layer: exact [..., rows, Hq] of the verification, drafted
    [..., rows - 1, Hq] of the draft steps that ran all rows but the last, None where none did."""

    exact: torch.Tensor
    drafted: torch.Tensor | None

    def of(self, request: int) -> RowLses:
        return RowLses(exact=self.exact[request], drafted=None if self.drafted is None else self.drafted[request])


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """logits [rows, Hq, prefix] of a verification, its rows and those of the round before; kv_heads: score rows."""

    logits: torch.Tensor
    now: RowLses
    past: RowLses | None
    kv_heads: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A way to score keys, driven by a preset. Without `scores` they are the preset's own, as its kernels give them.

    quantises: differs from exact scores by rounding alone, so that its error is worth telling in tolerances.
    """

    name: str
    label: str
    preset: str
    scores: Callable[[Seen], torch.Tensor] | None = None
    quantises: bool = False


def head_means(values: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """values [rows, Hq, N] -> [kv_heads, N], the mean over rows and each KV head's group."""
    return values.unflatten(1, (kv_heads, -1)).mean(dim=(0, 2))


def weights(seen: Seen, normaliser: torch.Tensor, *, ceiling: float = 64.0) -> torch.Tensor:
    """Scores with a normaliser [rows, Hq] of the first rows; a weight saturates at 2^ceiling, by default so far up
    that it does not matter."""
    logits = seen.logits[: len(normaliser)]
    return head_means((logits - normaliser[..., None]).clamp_max(ceiling * math.log(2.0)).exp(), seen.kv_heads)


def exact(seen: Seen) -> torch.Tensor:
    return weights(seen, seen.now.exact)


def of_rows(seen: Seen, rows: list[int]) -> torch.Tensor:
    return head_means((seen.logits[rows] - seen.now.exact[rows][..., None]).exp(), seen.kv_heads)


def ends(seen: Seen) -> torch.Tensor:
    return of_rows(seen, sorted({0, len(seen.now.exact) - 1}))


def last(seen: Seen) -> torch.Tensor:
    return of_rows(seen, [len(seen.now.exact) - 1])


def with_highest(drafted: torch.Tensor) -> torch.Tensor:
    return torch.cat([drafted, drafted.amax(dim=0, keepdim=True)])


def with_neighbour(drafted: torch.Tensor) -> torch.Tensor:
    return torch.cat([drafted, drafted[-1:]])


def correction(past: RowLses | None) -> torch.Tensor | float:
    """By how much the draft steps of the round before fell short, the mean of each head."""
    if past is None or past.drafted is None:
        return 0.0
    return (past.exact[:-1] - past.drafted).mean(dim=0)


def highest(seen: Seen) -> torch.Tensor:
    return exact(seen) if seen.now.drafted is None else weights(seen, with_highest(seen.now.drafted))


def neighbour(seen: Seen) -> torch.Tensor:
    return exact(seen) if seen.now.drafted is None else weights(seen, with_neighbour(seen.now.drafted))


def dropped(seen: Seen) -> torch.Tensor:
    return exact(seen) if seen.now.drafted is None else weights(seen, seen.now.drafted)


def neighbour_corrected(seen: Seen) -> torch.Tensor:
    if seen.now.drafted is None:
        return exact(seen)
    return weights(seen, with_neighbour(seen.now.drafted) + correction(seen.past))


def corrected(seen: Seen) -> torch.Tensor:
    """The preset's rule, corrected before the floor."""
    if seen.now.drafted is None or seen.past is None:
        return exact(seen)
    references = with_highest(seen.now.drafted + correction(seen.past))
    return weights(seen, references.maximum(seen.past.exact.amin(dim=0)))


def capped(seen: Seen) -> torch.Tensor:
    """What no kernel does today: a weight counts for no more than 1/64 of a row's attention."""
    if seen.now.drafted is None:
        return exact(seen)
    return weights(seen, with_neighbour(seen.now.drafted), ceiling=-6.0)


def previous(seen: Seen) -> torch.Tensor:
    if seen.past is None:
        return exact(seen)
    return weights(seen, seen.past.exact.mean(dim=0).expand_as(seen.now.exact))


def split_maxima(logits: torch.Tensor) -> torch.Tensor:
    """The largest logit of each row's split, at every key."""
    parts = [part.amax(dim=-1, keepdim=True).expand_as(part) for part in logits.split(SPLIT_KEYS, dim=-1)]
    return torch.cat(parts, dim=-1)


def linear_dump(seen: Seen) -> torch.Tensor:
    """Weights kept as whole 255ths of their split's largest."""
    largest = split_maxima(seen.logits)
    kept = (LINEAR_CODES * (seen.logits - largest).exp()).round() / LINEAR_CODES
    return head_means(kept * (largest - seen.now.exact[..., None]).exp(), seen.kv_heads)


def log_dump(seen: Seen) -> torch.Tensor:
    """Weights kept as whole steps of their logarithm below their split's largest."""
    largest, step = split_maxima(seen.logits), LOG_OCTAVES * math.log(2.0) / LOG_CODES
    code = ((seen.logits - largest) / step).round()
    kept = torch.where(code >= -LOG_CODES, (code * step).exp(), 0.0)
    return head_means(kept * (largest - seen.now.exact[..., None]).exp(), seen.kv_heads)


def mean_logits(seen: Seen) -> torch.Tensor:
    return head_means(seen.logits, seen.kv_heads)


METHODS = {
    method.name: method
    for method in (
        Method(name="exact", label="all rows, exact: pillar", preset="pillar"),
        Method(name="dump-log", label="all rows, 8-bit log dump", preset="pillar", scores=log_dump, quantises=True),
        Method(
            name="dump-linear", label="all rows, 8-bit linear dump", preset="pillar", scores=linear_dump, quantises=True
        ),
        Method(name="reference", label="reference: the preset", preset="reference"),
        Method(name="corrected", label="reference, corrected", preset="reference", scores=corrected),
        Method(name="highest", label="reference, no floor", preset="reference", scores=highest),
        Method(name="dropped", label="no floor, last row left out", preset="reference", scores=dropped),
        Method(name="neighbour", label="no floor, last row its neighbour's", preset="reference", scores=neighbour),
        Method(
            name="neighbour-corrected",
            label="the same, corrected",
            preset="reference",
            scores=neighbour_corrected,
        ),
        Method(name="capped", label="the same, weights up to 1/64", preset="reference", scores=capped),
        Method(name="previous", label="previous round's mean lse", preset="reference", scores=previous),
        Method(name="ends", label="first and last row, KV head", preset="pillar", scores=ends),
        Method(name="vegas", label="first and last row, layer: vegas", preset="vegas"),
        Method(name="last", label="last row, KV head", preset="pillar", scores=last),
        Method(name="logit", label="mean of logits", preset="pillar", scores=mean_logits),
        Method(name="streaming", label="newest keys: streaming", preset="streaming"),
    )
}
