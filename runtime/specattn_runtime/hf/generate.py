"""A decoding method for `model.generate(..., custom_generate=...)`: drafts and verifies where generate would step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GenerateDecoderOnlyOutput

from specattn_codegen.errors import SpecError
from specattn_runtime.decoding.decode_spec import DecodeSpec
from specattn_runtime.decoding.presets import Preset, preset_named
from specattn_runtime.decoding.sampling import GREEDY, Sampling
from specattn_runtime.decoding.session import Progress, Session, open_session
from specattn_runtime.hf.attention import own_attention
from specattn_runtime.hf.layers import layer_kernels
from specattn_runtime.hf.model import HfModel
from specattn_runtime.hf.texts import Texts

LARGEST_SEED = 2**62
# What generate prepares for its own loop and this one has no use for.
UNUSED = {"past_key_values", "position_ids", "logits_to_keep", "use_cache", "token_type_ids", "cache_position"}
SERVED = {"attention_mask", *UNUSED}


@dataclass(frozen=True, slots=True, kw_only=True)
class Speculative:
    """Passed as custom_generate, decodes speculatively what generate would decode a token a step.

    Greedy texts are the same, rounding apart; sampled ones have the same distribution. Logits processors, stopping
    criteria, left padding, num_return_sequences and return_dict_in_generate with scores and logits work as they do in
    generate; a stopping criterion sees one request at a time. Beams, and the outputs of attention weights and hidden
    states, are refused.

    preset, draft_len, budget, page_size, refresh_interval, adaptive: see DecodeSpec
    streamer  takes the tokens of a single prompt. Here and not in generate, which keeps it from custom methods
    watch     called after every round with the session and what the round gave each request
    """

    preset: Preset
    draft_len: int = 6
    budget: float = 0.07
    page_size: int = 16
    refresh_interval: int = 1
    adaptive: bool = False
    streamer: BaseStreamer | None = None
    watch: Callable[[Session, Sequence[Progress]], None] | None = None

    @torch.no_grad()
    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        *,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        **model_kwargs: Any,
    ) -> GenerateDecoderOnlyOutput | torch.Tensor:
        """input_ids [B, N] -> sequences [B, N + new tokens], as generate returns them."""
        _require_plain(generation_config, model_kwargs, synced_gpus=synced_gpus)
        heads, kernels = layer_kernels(model, self.page_size)
        most_new = generation_config.max_length - input_ids.shape[1]
        spec = self._spec(generation_config, most_new)
        mask = model_kwargs.get("attention_mask")  # named among the parameters it would be given twice
        texts = Texts(input_ids.to(model.device), mask, generation_config.max_length)
        kept = generation_config.return_dict_in_generate and (
            generation_config.output_scores or generation_config.output_logits
        )
        adapter = HfModel(model, heads, texts, logits_processor, records=bool(kept))
        prompts = [texts.prompt(request) for request in range(len(input_ids))]
        session = open_session(
            adapter,
            kernels,
            spec,
            max_requests=len(prompts),
            num_pages=sum(-(-(len(prompt) + most_new - 1) // self.page_size) for prompt in prompts),
        )
        for request, prompt in enumerate(prompts):
            own = dataclasses.replace(spec.sampling, seed=(spec.sampling.seed + request) % LARGEST_SEED)
            session.add_request(prompt, dataclasses.replace(spec, sampling=own))
        if self.streamer is not None:
            if len(prompts) > 1:
                raise SpecError(f"streamer: takes one prompt, and there are {len(prompts)}; generate one at a time")
            self.streamer.put(input_ids.cpu())
        with own_attention(model):
            run = _Run(session, texts, stopping_criteria, self.streamer, self.watch)
            run.to_the_end()
        if self.streamer is not None:
            self.streamer.end()
        sequences = _sequences(input_ids, run.tokens, generation_config)
        if not generation_config.return_dict_in_generate:
            return sequences
        raw, processed = (
            _steps(adapter, prompts, run.tokens, kind) if wanted else None
            for kind, wanted in enumerate((generation_config.output_logits, generation_config.output_scores))
        )
        return GenerateDecoderOnlyOutput(sequences=sequences, logits=raw, scores=processed)  # pyright: ignore[reportArgumentType]

    def _spec(self, config: GenerationConfig, most_new: int) -> DecodeSpec:
        sampling = GREEDY
        if config.do_sample:  # temperature, top_k and top_p are among the logits processors
            seed = int(torch.randint(LARGEST_SEED, ()))  # torch's own, so that torch.manual_seed repeats a text
            sampling = Sampling(temperature=1.0, seed=seed)
        stops = [] if config.eos_token_id is None else config.eos_token_id
        return DecodeSpec(
            preset=self.preset,
            draft_len=self.draft_len,
            adaptive=self.adaptive,
            budget=self.budget,
            refresh_interval=self.refresh_interval,
            sampling=sampling,
            max_new_tokens=most_new,
            page_size=self.page_size,
            stop_tokens=frozenset(stops if isinstance(stops, list) else [stops]),
        )


def speculative(
    preset: str | Preset = "vegas",
    *,
    draft_len: int = 6,
    budget: float = 0.07,
    page_size: int = 16,
    refresh_interval: int = 1,
    adaptive: bool = False,
    streamer: BaseStreamer | None = None,
    watch: Callable[[Session, Sequence[Progress]], None] | None = None,
) -> Speculative:
    """A decoding method for `model.generate(..., custom_generate=speculative("vegas"))`; see Speculative."""
    return Speculative(
        preset=preset_named(preset) if isinstance(preset, str) else preset,
        draft_len=draft_len,
        budget=budget,
        page_size=page_size,
        refresh_interval=refresh_interval,
        adaptive=adaptive,
        streamer=streamer,
        watch=watch,
    )


@dataclass(slots=True)
class _Run:
    """A session driven until every request has ended, by its limits or by a stopping criterion."""

    session: Session
    texts: Texts
    criteria: StoppingCriteriaList
    streamer: BaseStreamer | None
    watch: Callable[[Session, Sequence[Progress]], None] | None
    tokens: list[list[int]] = field(init=False)

    def __post_init__(self) -> None:
        self.tokens = [[] for _ in range(self.session.total)]

    def to_the_end(self) -> None:
        while self.session.has_work:
            progress = self.session.step()
            for given in progress:
                if self._take(given):
                    self.session.cancel(given.request)
            if self.watch is not None:
                self.watch(self.session, progress)

    def _take(self, given: Progress) -> bool:
        """Appends a round's tokens one by one, as generate would; whether a criterion ends the request there."""
        prompt, written = self.texts.padded_prompt(given.request), self.tokens[given.request]
        for token in given.tokens:
            written.append(token)
            if self.streamer is not None:
                self.streamer.put(torch.tensor([token]))
            text = torch.tensor([prompt + written], device=self.texts.device)
            if bool(self.criteria(text, None).all()):  # pyright: ignore[reportArgumentType]  # generate passes None too
                return True
        return False


def _require_plain(config: GenerationConfig, model_kwargs: dict[str, Any], *, synced_gpus: bool) -> None:
    """Raises SpecError for what generate can do and this method cannot."""
    if config.num_beams != 1:
        raise SpecError(f"num_beams={config.num_beams}: must be 1; drafts are verified along one text a request")
    if synced_gpus:
        raise SpecError("synced_gpus: models sharded by FSDP or ZeRO-3 are not served; load the model whole")
    for name in ("output_attentions", "output_hidden_states"):
        if getattr(config, name):
            raise SpecError(f"{name}=True: not kept by these kernels; leave it out")
    past = model_kwargs.get("past_key_values")
    if past is not None and past.get_seq_length():
        raise SpecError("past_key_values: starts from the prompt, with a cache of its own; leave it out")
    for name, value in model_kwargs.items():
        if name not in SERVED and value is not None:
            raise SpecError(f"{name}: only token ids and an attention_mask are served; leave it out")


def _sequences(input_ids: torch.Tensor, tokens: Sequence[Sequence[int]], config: GenerationConfig) -> torch.Tensor:
    longest = max(map(len, tokens))
    padding = config.pad_token_id if config.pad_token_id is not None else 0
    grown = [[*each, *[padding] * (longest - len(each))] for each in tokens]
    return torch.cat([input_ids, torch.tensor(grown, dtype=input_ids.dtype, device=input_ids.device)], dim=1)


def _steps(
    adapter: HfModel, prompts: Sequence[Sequence[int]], tokens: Sequence[Sequence[int]], kind: int
) -> tuple[torch.Tensor, ...]:
    """The logits [B, V] that chose each step's tokens, raw (0) or processed (1); an ended request's last ones stay."""

    def row(request: int, step: int) -> torch.Tensor:
        last = min(step, len(tokens[request]) - 1)
        return adapter.recorded[request, len(prompts[request]) - 1 + last][kind]

    steps = max(map(len, tokens))
    return tuple(torch.stack([row(request, step) for request in range(len(prompts))]) for step in range(steps))
