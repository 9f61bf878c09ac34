"""How well a model predicts what it never saw: bits a byte of ordinary text, and of answers that lie far back."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional

from benchmarks.training.model import Weights, logits
from specattn_bench.corpus import Corpus
from specattn_bench.episodes import KINDS, Answer
from specattn_runtime.model.llama_config import LlamaConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """texts [B, T + 1] int64; counted [B, T]: whether a byte's bits count."""

    texts: torch.Tensor
    counted: torch.Tensor


def plain(corpus: Corpus, *, seed: int, passages: int, length: int) -> HeldOut:
    rng = random.Random(f"{seed} plain")
    texts = torch.tensor([list(corpus.passage(rng, length + 1)) for _ in range(passages)])
    return HeldOut(texts=texts, counted=torch.ones(passages, length, dtype=torch.bool))


def answers(corpus: Corpus, *, seed: int, passages: int, length: int) -> HeldOut:
    """Every kind of episode in turn; only the answers count."""
    rng = random.Random(f"{seed} answers")
    kinds = list(KINDS.values())
    found = [kinds[place % len(kinds)](rng, corpus, length * 2 // 3, length + 1) for place in range(passages)]
    return HeldOut(
        texts=torch.tensor([list(one.text) for one in found]),
        counted=torch.stack([_spans(one.answers, length) for one in found]),
    )


def _spans(spans: Sequence[Answer], length: int) -> torch.Tensor:
    """Column i is about byte i + 1."""
    counted = torch.zeros(length, dtype=torch.bool)
    for span in spans:
        counted[span.start - 1 : span.stop - 1] = True
    return counted


def bits(config: LlamaConfig, weights: Weights, held_out: HeldOut) -> float:
    """Mean over the bytes that count."""
    texts, length = held_out.texts, held_out.counted.shape[1]
    with torch.no_grad():
        losses = [
            functional.cross_entropy(
                logits(config, weights, text[None, :-1], torch.arange(length)[None])[0], text[1:], reduction="none"
            )
            for text in texts
        ]
    return (torch.stack(losses)[held_out.counted].mean() / math.log(2)).item()
