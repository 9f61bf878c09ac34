"""Reads attention heads from a Hugging Face config.json, with transformers' own meaning per model_type.

Plain JSON only: the model's code is never run and transformers is not imported.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from specattn_codegen.errors import SpecError
from specattn_codegen.models.model_defaults import DEFAULTS, FULL_EVERY
from specattn_codegen.models.model_heads import HeadFields, ModelHeads
from specattn_codegen.models.model_refusals import SERVABLE_LAYERS, why_unservable

# Multimodal configurations nest the language model; the first key found wins.
_NESTED = ("text_config", "llm_config", "language_config", "thinker_config")

_Q_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads")
_HIDDEN_SIZE = ("hidden_size", "n_embd", "d_model")
_HEAD_DIM = ("head_dim", "kv_channels")
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")

_PATTERN_KEYS = ("sliding_window_pattern", "_sliding_window_pattern", "global_attn_every_n_layers")

# The largest values any model has come near; beyond them a configuration is taken for damaged.
_MOST: dict[str, int] = dict.fromkeys((*_Q_HEADS, *_KV_HEADS, *_HEAD_DIM, *_LAYERS, "v_head_dim", "kv_n_heads"), 4096)
_MOST_OTHER = 2**31


@dataclass(frozen=True, slots=True)
class _Config:
    """One configuration's values, and where they came from for error messages."""

    where: str
    model_type: str
    values: Mapping[str, object]

    def error(self, message: str) -> SpecError:
        return SpecError(f"{self.where}: {message}")

    def whole(self, *keys: str) -> int | None:
        """The first of `keys` that is given, as a whole number of at least 1; None where none is given."""
        for key in keys:
            value = self.values.get(key)
            if value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _MOST.get(key, _MOST_OTHER):
                most = _MOST.get(key, _MOST_OTHER)
                raise self.error(f"{key}={value!r}: must be a whole number from 1 to {most}; mend it or give --heads")
            return value
        return None

    def number(self, key: str) -> float | None:
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, int | float) or isinstance(value, bool) or not (math.isfinite(value) and value > 0):
            raise self.error(f"{key}={value!r}: must be a positive number; mend it or give --heads")
        return float(value)

    def flag(self, key: str, *, default: bool) -> bool:
        return bool(self.values.get(key, default))


def read_config(path: Path) -> ModelHeads:
    """Heads of the model whose Hugging Face config.json is at `path`.

    Raises SpecError where the file cannot be read, is no configuration, or describes attention that cannot be served.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise SpecError(f"{path}: no such file; give a config.json, or a folder that holds one") from None
    except (OSError, UnicodeDecodeError) as problem:
        raise SpecError(f"{path}: cannot be read ({problem}); give a Hugging Face config.json") from None
    try:
        values = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as problem:
        raise SpecError(f"{path}: not valid JSON ({problem}); give a Hugging Face config.json") from None
    if not isinstance(values, dict):
        raise SpecError(f"{path}: holds no JSON object; give a Hugging Face config.json")
    return parse_config(values, name=str(path))


def parse_config(values: Mapping[str, object], *, name: str) -> ModelHeads:
    """Heads described by the parsed contents of a config.json; `name` stands for it in messages."""
    config = _language_model(values, name)
    if reason := why_unservable(config.model_type, config.values):
        raise config.error(f"model_type={config.model_type!r} cannot be served: {reason}")
    num_layers = config.whole(*_LAYERS)
    if num_layers is None:
        raise config.error(f"no number of layers ({_LAYERS[0]}); give a language model's config.json, or --heads")
    layer_kinds: dict[str, HeadFields] = {}
    for index, kind in enumerate(_kinds_by_layer(config, num_layers)):
        fields = _head_fields(config, kind, _overrides(config, index, kind))
        if layer_kinds.setdefault(kind, fields) != fields:
            raise config.error(f"its {kind} layers differ among themselves; give the heads of one with --heads")
    return ModelHeads(
        name=name,
        layer_kinds=layer_kinds,
        source=name,
        num_layers=num_layers,
        max_position_embeddings=config.whole(*_POSITIONS),
    )


def _language_model(values: Mapping[str, object], where: str) -> _Config:
    """The language model's own values, with transformers' defaults under them."""
    model_type = values.get("model_type")
    encoder_decoder = values.get("is_encoder_decoder")
    while nested := next((inner for key in _NESTED if isinstance(inner := values.get(key), Mapping)), None):
        model_type = nested.get("model_type", model_type)
        values = nested
    bare_type = str(model_type or "").removesuffix("_text")
    merged = {**DEFAULTS.get(bare_type, {}), **values}
    if encoder_decoder:
        merged["is_encoder_decoder"] = True
    return _Config(where=where, model_type=bare_type, values=merged)


def _kinds_by_layer(config: _Config, num_layers: int) -> list[str]:
    """full_attention or sliding_attention for every layer."""
    layer_types = config.values.get("layer_types")
    if isinstance(layer_types, list):
        if len(layer_types) < num_layers:
            raise config.error(f"layer_types names {len(layer_types)} of {num_layers} layers; mend it or give --heads")
        kinds = [SERVABLE_LAYERS[kind] for kind in layer_types[:num_layers]]
    else:
        kinds = ["sliding_attention" if _slides(config, index) else "full_attention" for index in range(num_layers)]
    # A window as long as the context hides nothing: such layers share kernels with full attention.
    window, positions = config.whole("sliding_window"), config.whole(*_POSITIONS)
    if window and positions and window >= positions:
        return ["full_attention"] * num_layers
    if "sliding_attention" in kinds and window is None:
        raise config.error("has sliding_attention layers but no sliding_window; mend it or give --heads")
    return kinds


def _slides(config: _Config, index: int) -> bool:
    """Whether layer `index` has a window, by the rules of transformers' configuration classes."""
    # transformers' Llama reads no window.
    if config.values.get("sliding_window") is None or config.model_type == "llama":
        return False
    if not config.flag("use_sliding_window", default=True):
        return False
    if config.model_type in FULL_EVERY:
        return bool((index + 1) % (config.whole(*_PATTERN_KEYS) or FULL_EVERY[config.model_type]))
    if config.model_type in ("qwen2", "qwen3"):
        return index >= (config.whole("max_window_layers") or 0)
    if config.model_type == "qwen2_moe":
        return index % 2 == 0 and index < (config.whole("max_window_layers") or 0)
    if config.model_type == "smollm3":
        every = config.whole("no_rope_layer_interval") or 4
        no_rope = config.values.get("no_rope_layers")
        return not no_rope[index] if isinstance(no_rope, list) and index < len(no_rope) else (index + 1) % every == 0
    return True


def _overrides(config: _Config, index: int, kind: str) -> _Config:
    """The configuration as layer `index` sees it: per-layer values of transformers 5, and Gemma 4's global layers."""
    values = dict(config.values)
    if config.model_type == "gemma4" and kind == "full_attention" and "per_layer_config" not in values:
        values["head_dim"] = values.get("global_head_dim", 512)
        if values.get("attention_k_eq_v") and values.get("num_global_key_value_heads"):
            values["num_key_value_heads"] = values["num_global_key_value_heads"]
    per_layer = values.get("per_layer_config")
    if isinstance(per_layer, Mapping):
        for key, changes in per_layer.items():
            if str(key).isdigit() and int(key) == index and isinstance(changes, Mapping):
                values.update(changes)
    return _Config(where=config.where, model_type=config.model_type, values=values)


def _head_fields(base: _Config, kind: str, config: _Config) -> HeadFields:
    num_q_heads = config.whole(*_Q_HEADS)
    if num_q_heads is None:
        raise base.error(f"no attention heads ({_Q_HEADS[0]}); give a language model's config.json, or --heads")
    head_dim = _head_dim(config, num_q_heads)
    fields: HeadFields = {
        "num_q_heads": num_q_heads,
        "num_kv_heads": _num_kv_heads(config, num_q_heads),
        "head_dim": head_dim,
    }
    v_head_dim = config.whole("v_head_dim")
    if v_head_dim and v_head_dim != head_dim:
        fields["v_head_dim"] = v_head_dim
    scale = _scale(config)
    if scale is not None and not math.isclose(scale, 1.0 / math.sqrt(head_dim), rel_tol=1e-9):
        fields["scale"] = scale
    if softcap := config.number("attn_logit_softcapping"):
        fields["softcap"] = softcap
    # transformers' sliding mask keeps keys j > i - sliding_window, which is sliding_window keys with the row's own.
    if kind == "sliding_attention":
        fields["window"] = config.whole("sliding_window")
    if config.model_type == "gpt_oss" or config.flag("attention_sinks", default=False):
        fields["sinks"] = True
    return fields


def _num_kv_heads(config: _Config, num_q_heads: int) -> int:
    given = config.whole(*_KV_HEADS)
    if config.model_type == "falcon":
        # Published falcon-7b says num_kv_heads=71 and means one: the flag decides in the old architecture.
        old_multi_query = config.flag("multi_query", default=True)
        if old_multi_query and not config.flag("new_decoder_architecture", default=False):
            return 1
    if config.model_type == "gpt_bigcode":
        return 1 if config.flag("multi_query", default=True) else num_q_heads
    if config.flag("multi_query_attention", default=False):
        return config.whole("multi_query_group_num") or 1
    attn_config = config.values.get("attn_config")
    if given is None and isinstance(attn_config, Mapping):
        nested = _Config(where=config.where, model_type=config.model_type, values=attn_config)
        given = nested.whole("kv_n_heads")
    return given or num_q_heads


def _head_dim(config: _Config, num_q_heads: int) -> int:
    if head_dim := config.whole(*_HEAD_DIM):
        return head_dim
    hidden_size = config.whole(*_HIDDEN_SIZE)
    if hidden_size is None:
        raise config.error("neither head_dim nor hidden_size; give a language model's config.json, or --heads")
    if hidden_size % num_q_heads:
        raise config.error(
            f"hidden_size={hidden_size} is no multiple of {num_q_heads} attention heads and head_dim is missing; "
            "add head_dim or give --heads"
        )
    return hidden_size // num_q_heads


def _scale(config: _Config) -> float | None:
    """What multiplies q . k; None for 1 / sqrt(head_dim)."""
    if config.model_type in ("gemma2", "gemma3", "vaultgemma"):
        scalar = config.number("query_pre_attn_scalar")
        return None if scalar is None else scalar**-0.5
    # Gemma 3n and 4 normalise queries and keys instead of scaling.
    if config.model_type in ("gemma3n", "gemma4"):
        return 1.0
    if config.model_type in ("gpt2", "gpt_bigcode") and not config.flag("scale_attn_weights", default=True):
        return 1.0
    return config.number("attention_multiplier")
