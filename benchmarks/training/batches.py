"""What a step of training reads: half ordinary text, half episodes. A step's batch depends on its number alone."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch

from specattn_bench.corpus import Corpus
from specattn_bench.episodes import KINDS

EPISODE_SHARE = 0.5
# An episode's definitions and ordinary text, as a share of its length.
REACH_SHARE = (0.3, 0.7)
# Half of the sequences skip positions at up to this many places, so that short ones learn long distances.
MOST_SKIPS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """inputs, targets, positions [sequences, length] int64."""

    inputs: torch.Tensor
    targets: torch.Tensor
    positions: torch.Tensor


def batch(corpus: Corpus, *, seed: int, step: int, sequences: int, length: int, max_positions: int) -> Batch:
    rng = random.Random(f"{seed} {step}")
    texts = torch.tensor([list(_text(rng, corpus, length + 1)) for _ in range(sequences)])
    positions = torch.tensor([_positions(rng, length, max_positions) for _ in range(sequences)])
    return Batch(inputs=texts[:, :-1], targets=texts[:, 1:], positions=positions)


def _text(rng: random.Random, corpus: Corpus, length: int) -> bytes:
    if rng.random() >= EPISODE_SHARE:
        return corpus.passage(rng, length)
    kind = KINDS[rng.choice(list(KINDS))]
    return kind(rng, corpus, round(length * rng.uniform(*REACH_SHARE)), length).text


def _positions(rng: random.Random, length: int, max_positions: int) -> list[int]:
    """Consecutive but for the skips, together at most up to the last position."""
    skips = rng.randint(1, MOST_SKIPS) if rng.random() < 0.5 else 0
    room = rng.randint(0, max_positions - length)
    cuts = sorted(rng.randrange(length) for _ in range(skips))
    ends = sorted(rng.randint(0, room) for _ in range(skips))
    jumps = dict(zip(cuts, ends, strict=True))
    shift, positions = 0, list[int]()
    for place in range(length):
        shift = jumps.get(place, shift)
        positions.append(place + shift)
    return positions
