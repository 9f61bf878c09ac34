"""Speculative decoding inside transformers' generate: the same texts, and everything around them as generate has it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    LlamaConfig,
    LogitsProcessor,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    StoppingCriteria,
)

from specattn_codegen.errors import SpecError
from specattn_runtime.decoding.presets import PRESETS
from specattn_runtime.hf import speculative
from tiny_models import TRAINED, one_thread

__all__ = ["one_thread"]

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
WITHOUT_HEAD_DIM: dict[str, Any] = {name: value for name, value in SIZES.items() if name != "head_dim"}
WINDOW: dict[str, Any] = {"sliding_window": 24}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SIZES),
    "qwen2": Qwen2Config(**WITHOUT_HEAD_DIM),
    "qwen3": Qwen3Config(**SIZES),
    "qwen3-moe": Qwen3MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32),
    "mistral": MistralConfig(**SIZES, **WINDOW),
    "gemma2": Gemma2Config(**SIZES, **WINDOW, query_pre_attn_scalar=12, final_logit_softcapping=5.0),
    "gemma3": Gemma3TextConfig(
        **SIZES, **WINDOW, query_pre_attn_scalar=12, layer_types=["sliding_attention", "full_attention"]
    ),
    "gpt-oss": GptOssConfig(**SIZES, **WINDOW, num_local_experts=4, num_experts_per_tok=2),
}


SMALL = dataclasses.replace(PRESETS["pillar"], min_budget=8)  # drafts leave most of a short text out


def random_model(name: str) -> PreTrainedModel:
    """Weights large enough that attention, windows and sinks matter to what comes next."""
    torch.manual_seed(3)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation="eager").eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.25)
    return model


def prompts(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 96, (batch, length), generator=torch.Generator().manual_seed(seed))


def greedy(model: PreTrainedModel, input_ids: torch.Tensor, **options: Any) -> Any:
    generate: Any = model.generate
    return generate(input_ids, do_sample=False, **{"max_new_tokens": 24, **options})


@pytest.mark.parametrize("name", CONFIGS)
def test_every_family_gives_the_text_generate_gives(name: str) -> None:
    model, input_ids = random_model(name), prompts(1, 70)
    plain = greedy(model, input_ids)
    passes: list[int] = []
    method = speculative(SMALL, draft_len=4, watch=lambda session, _: passes.append(session.rounds))
    assert torch.equal(greedy(model, input_ids, custom_generate=method), plain)
    assert model.config._attn_implementation == "eager"
    assert passes


@pytest.mark.parametrize("preset", ["vegas", "reference", "quest", "streaming", "dense"])
def test_presets_and_the_trained_checkpoint(preset: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(TRAINED, dtype=torch.float32).eval()
    text = b"class Reader:\n    def __init__(self, limit):\n        self._limit = limit\n        self._buffer = b''\n"
    input_ids = torch.tensor([list(text * 3)])
    rounds: list[int] = []
    method = speculative(preset, draft_len=4, watch=lambda session, _: rounds.append(session.rounds))
    plain = greedy(model, input_ids, max_new_tokens=48)
    assert torch.equal(greedy(model, input_ids, max_new_tokens=48, custom_generate=method), plain)
    assert (rounds[-1] < 48) == (preset != "dense")


def test_padded_batches_end_each_on_its_own() -> None:
    """Eos in the middle of a text, padding before the prompt and after the end."""
    model, input_ids = random_model("llama"), prompts(3, 40)
    input_ids[0, :13], input_ids[2, :30] = 0, 0
    mask = (input_ids != 0).long()
    free = greedy(model, input_ids, attention_mask=mask, eos_token_id=None)
    stop = int(free[1, 45])
    options: dict[str, Any] = {"attention_mask": mask, "eos_token_id": stop}
    plain = greedy(model, input_ids, **options)
    assert (plain[1, 46:] == 0).all()
    method = speculative(SMALL, draft_len=5)
    assert torch.equal(greedy(model, input_ids, custom_generate=method, **options), plain)


class Banned(LogitsProcessor):
    """Forbids what the text already ends with."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.scatter(1, input_ids[:, -1:], -torch.inf)


class Written(StoppingCriteria):
    """Ends a text that has any token three times after the prompt."""

    def __call__(self, input_ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return torch.tensor([(torch.bincount(row[40:]) >= 3).any().item() for row in input_ids])


def test_processors_and_criteria_see_what_generate_shows_them() -> None:
    model, input_ids = random_model("llama"), prompts(1, 40)
    options: dict[str, Any] = {
        "logits_processor": [Banned()],
        "stopping_criteria": [Written()],
        "repetition_penalty": 1.3,
        "no_repeat_ngram_size": 4,
        "min_new_tokens": 6,
        "eos_token_id": list(range(3, 40)),
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
    }
    plain = greedy(model, input_ids, **options)
    ours = greedy(model, input_ids, custom_generate=speculative(SMALL, draft_len=4), **options)
    assert torch.equal(ours.sequences, plain.sequences)
    assert len(ours.scores) == len(plain.scores) == plain.sequences.shape[1] - 40
    torch.testing.assert_close(torch.stack(ours.scores), torch.stack(plain.scores), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.stack(ours.logits), torch.stack(plain.logits), rtol=1e-4, atol=1e-4)


def test_sampling_repeats_with_torchs_seed_and_keeps_to_its_warpers() -> None:
    model, input_ids = random_model("llama"), prompts(1, 40)

    def sample(seed: int, **options: Any) -> torch.Tensor:
        torch.manual_seed(seed)
        method = speculative(SMALL, draft_len=4)
        return model.generate(input_ids, do_sample=True, max_new_tokens=16, custom_generate=method, **options)  # pyright: ignore

    one = sample(5, num_return_sequences=3)
    assert torch.equal(one, sample(5, num_return_sequences=3))
    assert not torch.equal(one, sample(6, num_return_sequences=3))
    assert len({tuple(row) for row in one.tolist()}) == 3
    assert torch.equal(sample(7, top_k=1), greedy(model, input_ids, max_new_tokens=16))


def test_first_sampled_tokens_have_the_models_distribution() -> None:
    """Two tokens of many texts: the first comes from the prompt's last row, the second through a draft."""
    model, input_ids = random_model("llama"), prompts(1, 20)
    torch.manual_seed(11)
    count = 1500
    texts = model.generate(
        input_ids,
        do_sample=True,
        temperature=0.5,
        top_k=6,
        max_new_tokens=3,
        num_return_sequences=count,
        custom_generate=speculative(SMALL, draft_len=2),
    )[:, 20:]  # pyright: ignore
    with torch.no_grad():
        first = (model(input_ids).logits[0, -1] / 0.5).softmax(0)
    kept = first.topk(6)
    expected = kept.values / kept.values.sum() * count
    found = torch.tensor([(texts[:, 0] == token).sum() for token in kept.indices])
    assert found.sum() == count
    assert ((found - expected) ** 2 / expected).sum() < 20.5  # chi-square, 5 degrees of freedom: 0.999
    leader = int(kept.indices[0])
    follow = texts[texts[:, 0] == leader][:, 1]
    with torch.no_grad():
        second = (model(torch.cat([input_ids, torch.tensor([[leader]])], 1)).logits[0, -1] / 0.5).softmax(0)
    kept = second.topk(6)
    expected = kept.values / kept.values.sum() * len(follow)
    found = torch.tensor([(follow == token).sum() for token in kept.indices])
    assert found.sum() == len(follow)
    assert ((found - expected) ** 2 / expected).sum() < 20.5


def test_streams_token_by_token() -> None:
    class Collects(transformers.generation.streamers.BaseStreamer):
        def __init__(self) -> None:
            self.pieces: list[list[int]] = []
            self.ended = False

        def put(self, value: torch.Tensor) -> None:
            self.pieces.append(value.flatten().tolist())

        def end(self) -> None:
            self.ended = True

    model, input_ids, streamer = random_model("llama"), prompts(1, 40), Collects()
    text = greedy(model, input_ids, custom_generate=speculative(SMALL, streamer=streamer))
    assert streamer.pieces[0] == input_ids[0].tolist()
    assert streamer.pieces[1:] == [[token] for token in text[0, 40:].tolist()]
    assert streamer.ended


def test_what_cannot_be_served_says_so() -> None:
    model, input_ids, method = random_model("llama"), prompts(2, 20), speculative(SMALL)
    holes = torch.ones_like(input_ids)
    holes[1, :3] = 0
    holes[1, 6:8] = 0
    refused: dict[str, dict[str, Any]] = {
        "num_beams=2: must be 1": {"num_beams": 2},
        "prompt 1: its attention_mask is 0 at 6 after a 1: it must be zeros, then": {"attention_mask": holes},
        "prompt 0: its attention_mask is all 0": {"attention_mask": torch.zeros_like(input_ids)},
        "output_attentions=True: not kept": {"output_attentions": True, "return_dict_in_generate": True},
        "exceed the model's 256 positions": {"max_new_tokens": 300},
        "takes one prompt, and there are 2": {
            "custom_generate": speculative(streamer=transformers.TextStreamer(None))  # pyright: ignore
        },
    }
    for words, options in refused.items():
        with pytest.raises(SpecError, match=words):
            greedy(model, input_ids, **{"custom_generate": method, **options})
    other = AutoModelForCausalLM.from_config(Phi3Config(**WITHOUT_HEAD_DIM))
    with pytest.raises(SpecError, match="served are gemma2"):
        greedy(other, input_ids, custom_generate=method)
    mixed = random_model("llama")
    mixed.model.layers[1].self_attn.k_proj.bfloat16()
    with pytest.raises(SpecError, match=r"layer 1: k_proj.weight is torch.bfloat16 in a model of torch.float32"):
        greedy(mixed, input_ids, custom_generate=method)
    spread = random_model("llama")
    spread.lm_head.to("meta")
    with pytest.raises(SpecError, match="model on cpu, meta: must be on one device"):
        greedy(spread, input_ids, custom_generate=method)
    with pytest.raises(SpecError, match=r"budget=1\.5"):
        greedy(random_model("llama"), input_ids, custom_generate=speculative(budget=1.5))
    with pytest.raises(SpecError, match=r"nsa-verify.*planned"):
        speculative("nsa-verify")
    alone = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES), attn_implementation="specattn")
    with pytest.raises(SpecError, match="inside generate"):
        alone(input_ids)
