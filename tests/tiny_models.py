"""Small models for tests: the trained byte-level checkpoint, and Llamas whose weights come from a formula."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from specattn_runtime.model.checkpoint import build_llama, expected_shapes
from specattn_runtime.model.llama import Llama
from specattn_runtime.model.llama_config import LlamaConfig, parse_config

TRAINED = Path(__file__).parent / "assets" / "tiny-bytes-llama"

CONFIG: dict[str, object] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 48,
    "intermediate_size": 64,
    "max_position_embeddings": 256,
    "num_attention_heads": 6,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "vocab_size": 256,
}
STRETCHED: dict[str, object] = {
    **CONFIG,
    "attention_bias": True,
    "mlp_bias": True,
    "tie_word_embeddings": False,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500.0,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """For modules that import it: models this small lose more to waking threads than they gain by them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def wavy_tensors(config: LlamaConfig) -> dict[str, torch.Tensor]:
    """float64 weights from a formula, the same under every version of torch; large enough to make attention peak."""
    tensors: dict[str, torch.Tensor] = {}
    for number, (name, shape) in enumerate(sorted(expected_shapes(config).items())):
        steps = torch.arange(math.prod(shape), dtype=torch.float64)
        waves = torch.sin(steps * 1.618 + number) + torch.cos(steps * steps * 0.0137 + 2.0 * number)
        tensors[name] = (waves / math.sqrt(shape[-1]) * 1.5 if len(shape) > 1 else 1.0 + 0.2 * waves).view(shape)
    return tensors


def wavy_llama(fields: dict[str, object] = CONFIG, *, dtype: torch.dtype = torch.float64) -> Llama:
    config = parse_config(fields)
    return build_llama(config, {name: tensor.to(dtype) for name, tensor in wavy_tensors(config).items()})


def save_checkpoint(folder: Path, fields: dict[str, object] = CONFIG) -> dict[str, torch.Tensor]:
    """Writes config.json and model.safetensors; returns the tensors."""
    tensors = wavy_tensors(parse_config(fields))
    (folder / "config.json").write_text(json.dumps(fields))
    save_file(tensors, folder / "model.safetensors")
    return tensors


def same_tensors(one: Llama, other: Llama) -> bool:
    """Bitwise equality of every weight and table."""
    pairs = [(one.embedding, other.embedding), (one.head, other.head), (one.norm, other.norm)]
    pairs += [(one.cos, other.cos), (one.signed_sin, other.signed_sin)]
    for ours, theirs in zip(one.layers, other.layers, strict=True):
        for field in dataclasses.fields(ours):
            part, twin = getattr(ours, field.name), getattr(theirs, field.name)
            if isinstance(part, torch.Tensor):
                pairs.append((part, twin))
            else:
                pairs.append((part.weight, twin.weight))
                pairs += [(part.bias, twin.bias)] if part.bias is not None else []
    return all(torch.equal(left, right) for left, right in pairs)
