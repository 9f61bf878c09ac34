"""The Llama that is trained: its config, first weights, forward pass and checkpoint folder."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional

from specattn_codegen.errors import SpecError
from specattn_runtime.model.checkpoint import build_llama, expected_shapes
from specattn_runtime.model.llama_config import LlamaConfig

Weights = dict[str, torch.Tensor]
QUERY_HEADS = 8
KV_HEADS = {"gqa": 2, "mha": QUERY_HEADS}


def config_fields(kv_heads: int, *, hidden_size: int, layers: int, max_positions: int) -> dict[str, object]:
    """The config.json."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "dtype": "float16",
        "head_dim": 32,
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "intermediate_size": 3 * hidden_size,
        "max_position_embeddings": max_positions,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": QUERY_HEADS,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100_000.0,
        "tie_word_embeddings": True,
        "vocab_size": 256,
    }


def started(folder: Path, kv_heads: int, max_positions: int) -> tuple[dict[str, object], Weights]:
    """A checkpoint's config and weights with other positions and KV heads: more of them say at first what it says."""
    fields = json.loads((folder / "config.json").read_text())
    copies, rest = divmod(kv_heads, fields["num_key_value_heads"])
    if rest:
        raise SpecError(f"{folder}: has {fields['num_key_value_heads']} KV heads, of which {kv_heads} is no multiple")
    weights = {name: weight.float() for name, weight in load_file(folder / "model.safetensors").items()}
    for name, weight in weights.items():
        if name.endswith(("k_proj.weight", "v_proj.weight")):
            heads = weight.unflatten(0, (-1, fields["head_dim"]))
            weights[name] = heads.repeat_interleave(copies, dim=0).flatten(0, 1)
    fields |= {"num_key_value_heads": kv_heads, "max_position_embeddings": max_positions}
    return fields, {name: weight.requires_grad_() for name, weight in weights.items()}


def first_weights(config: LlamaConfig, seed: int) -> Weights:
    """Float32 leaves, by Hugging Face's names; the deeper the model, the smaller what writes to its residual stream."""
    generator = torch.Generator().manual_seed(seed)
    weights: Weights = {}
    for name, shape in expected_shapes(config).items():
        scale = 0.02 / (math.sqrt(2 * config.num_layers) if name.endswith(("o_proj.weight", "down_proj.weight")) else 1)
        first = scale * torch.randn(*shape, generator=generator) if len(shape) > 1 else torch.ones(*shape)
        weights[name] = first.requires_grad_()
    return weights


def logits(config: LlamaConfig, weights: Weights, inputs: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """inputs, positions [sequences, length] -> next-byte logits [sequences, length, 256], products in bfloat16."""
    sequences = len(inputs)

    def attention(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        del layer  # all alike
        q, k, v = (rows.unflatten(0, (sequences, -1)).transpose(1, 2) for rows in (q, k, v))
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2).flatten(0, 1)

    llama = build_llama(config, weights, packed=False)
    with torch.autocast("cpu", torch.bfloat16):
        found = llama.logits(llama.forward(inputs.flatten(), positions.flatten(), attention))
    return found.float().view(*inputs.shape, -1)


def save(folder: Path, fields: dict[str, object], weights: Weights) -> None:
    """config.json and float16 model.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
    halves = {name: weight.detach().half() for name, weight in weights.items()}
    save_file(halves, folder / "model.safetensors", {"format": "pt"})
