"""transformers' own generate, continuing cached prompts. The one module of its question that needs transformers."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, StoppingCriteria, StoppingCriteriaList
from transformers.utils import logging

from specattn_bench.throughput_measured import Played, Step
from specattn_bench.throughput_models import Prompts, Subject
from specattn_codegen.proof.problems import TORCH_DTYPES
from specattn_codegen.spec import Dtype
from specattn_runtime.decoding.generation import RequestResult

GENERATED = 5  # tokens in its turn


def in_transformers(subject: Subject, dtype: Dtype) -> Any:
    """The subject's model, or for drawn weights one of the same shape, with the attention transformers chooses."""
    logging.disable_progress_bar()  # of loading weights, in the middle of ours
    if subject.drawn:
        config = LlamaConfig.from_pretrained(subject.folder)
        return AutoModelForCausalLM.from_config(config, dtype=TORCH_DTYPES[dtype])
    return AutoModelForCausalLM.from_pretrained(subject.folder, dtype=TORCH_DTYPES[dtype])


class _Stamps(StoppingCriteria):
    """Never stops, and notes when it is asked."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:  # pyright: ignore
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool)


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainGenerate:
    """`generate` with the cache it takes by default."""

    model: Any
    prompts: Prompts
    name: str = field(default="transformers generate", init=False)

    @torch.inference_mode()
    def play(self, chosen: Sequence[int], steps: int | None = None) -> Played:
        steps = GENERATED if steps is None else steps
        tokens = torch.tensor([list(self.prompts.tokens[prompt]) for prompt in chosen])
        stamps = _Stamps()
        found = self.model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            past_key_values=self._cached(chosen),
            max_new_tokens=steps + 1,
            min_new_tokens=steps + 1,
            do_sample=False,
            stopping_criteria=StoppingCriteriaList([stamps]),
        )
        given = [Step(seconds=end - start, tokens=1.0) for start, end in itertools.pairwise(stamps.times)]
        unknown = (0.0,) * (steps + 1)
        texts = found[:, tokens.shape[1] :].tolist()
        results = [RequestResult(tokens=tuple(text), margins=unknown, accepted=(), drafted=()) for text in texts]
        return Played(steps=given, kinds=[self.prompts.kinds[prompt] for prompt in chosen], results=results)

    def _cached(self, chosen: Sequence[int]) -> DynamicCache:
        """Everything but the last token's."""
        cache = DynamicCache()
        for layer in range(len(self.prompts.keys[0])):
            keys, values = (
                torch.stack([part[prompt][layer, :-1] for prompt in chosen]).transpose(1, 2)
                for part in (self.prompts.keys, self.prompts.values)
            )
            cache.update(keys, values, layer)
        return cache
