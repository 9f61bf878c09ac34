"""What a Llama-architecture config.json says, checked: a field that would change the arithmetic is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from specattn_codegen.errors import CheckpointError
from specattn_codegen.heads import HeadConfig
from specattn_runtime.model.rope import Rope

Json = Mapping[str, object]
ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM")


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaConfig:
    """Sizes of a Llama: token embedding, layers of attention and SwiGLU with RMS norms, output head.

    stop_tokens are the ids that end a text; empty where the config names none.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    heads: HeadConfig
    max_positions: int
    norm_eps: float
    rope: Rope
    tied_head: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    stop_tokens: frozenset[int] = frozenset()


def read_config(folder: Path) -> LlamaConfig:
    """The config of a checkpoint folder. Raises CheckpointError, naming the field, for what this loop cannot run."""
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder}: no config.json; give the folder of a Hugging Face checkpoint")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not JSON ({error}); download it again") from error
    if not isinstance(fields, dict):
        raise CheckpointError(f"{path}: must hold a JSON object")
    return parse_config(fields)


def parse_config(fields: Json) -> LlamaConfig:
    """A config.json's fields, as written by transformers 4 (`rope_theta`, `rope_scaling`) or 5 (`rope_parameters`)."""
    _refuse_unsupported(fields)
    hidden_size = _whole(fields, "hidden_size")
    num_q_heads = _whole(fields, "num_attention_heads")
    max_positions = _whole(fields, "max_position_embeddings")
    heads = HeadConfig(
        num_q_heads=num_q_heads,
        num_kv_heads=_whole(fields, "num_key_value_heads", default=num_q_heads),
        head_dim=_whole(fields, "head_dim", default=hidden_size // num_q_heads),
    )
    if heads.head_dim % 2:
        raise CheckpointError(f"head_dim={heads.head_dim}: rotary embeddings need an even one")
    return LlamaConfig(
        vocab_size=_whole(fields, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=_whole(fields, "intermediate_size"),
        num_layers=_whole(fields, "num_hidden_layers"),
        heads=heads,
        max_positions=max_positions,
        norm_eps=_number(fields, "rms_norm_eps", default=1e-6),
        rope=_rope(fields, max_positions),
        tied_head=_flag(fields, "tie_word_embeddings"),
        attention_bias=_flag(fields, "attention_bias"),
        mlp_bias=_flag(fields, "mlp_bias"),
        stop_tokens=_stop_tokens(fields),
    )


def _refuse_unsupported(fields: Json) -> None:
    architectures = fields.get("architectures")
    name = architectures[0] if isinstance(architectures, list) and architectures else None
    if name not in ARCHITECTURES:
        raise CheckpointError(f"architectures={architectures!r}: only {' and '.join(ARCHITECTURES)} can be decoded")
    if fields.get("hidden_act", "silu") != "silu":
        raise CheckpointError(f"hidden_act={fields['hidden_act']!r}: only silu is supported")
    if fields.get("quantization_config") is not None:
        raise CheckpointError("quantization_config: quantised weights are not supported; use a float checkpoint")
    window = fields.get("sliding_window")
    if window is not None and _whole(fields, "sliding_window") < _whole(fields, "max_position_embeddings"):
        raise CheckpointError(f"sliding_window={window}: window attention is not supported by this loop yet")


def _rope(fields: Json, max_positions: int) -> Rope:
    scaling = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    if not isinstance(scaling, Mapping):
        raise CheckpointError(f"rope_scaling={scaling!r}: must be an object")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ("default", "linear", "llama3"):
        raise CheckpointError(f"rope_type={kind!r}: not supported; supported: default, linear, llama3")
    if _number(scaling, "partial_rotary_factor", default=1.0) != 1.0:
        raise CheckpointError(f"partial_rotary_factor={scaling['partial_rotary_factor']}: only 1.0 is supported")
    theta = _number(scaling, "rope_theta", default=_number(fields, "rope_theta", default=10_000.0))
    if kind == "default":
        return Rope(theta=theta)
    if kind == "linear":
        return Rope(theta=theta, kind="linear", factor=_number(scaling, "factor"))
    return Rope(
        theta=theta,
        kind="llama3",
        factor=_number(scaling, "factor"),
        low_freq_factor=_number(scaling, "low_freq_factor"),
        high_freq_factor=_number(scaling, "high_freq_factor"),
        original_max_positions=_whole(scaling, "original_max_position_embeddings", default=max_positions),
    )


def _stop_tokens(fields: Json) -> frozenset[int]:
    value = fields.get("eos_token_id")
    listed = value if isinstance(value, list) else [] if value is None else [value]
    stops = frozenset(token for token in listed if isinstance(token, int))
    if len(stops) != len(listed):
        raise CheckpointError(f"eos_token_id={value!r}: must be a token id or a list of them")
    return stops


def _whole(fields: Json, name: str, *, default: int | None = None) -> int:
    value = fields.get(name)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(f"config.json: {name}={value!r} must be a whole number of at least 1")
    return value


def _number(fields: Json, name: str, *, default: float | None = None) -> float:
    value = fields.get(name)
    value = default if value is None else value
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise CheckpointError(f"config.json: {name}={value!r} must be a number")
    return float(value)


def _flag(fields: Json, name: str) -> bool:
    value = fields.get(name)
    if value not in (None, True, False):
        raise CheckpointError(f"config.json: {name}={value!r} must be true or false")
    return bool(value)
