"""Which models these kernels cannot serve, and why. Knows reasons only; reading heads is model_config's business."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

MLA = "multi-head latent attention (MLA) caches one compressed vector a token instead of keys and values of heads"
STATE_SPACE = "a state-space model keeps one recurrent state and has no keys and values to select from"
RECURRENT = "a recurrent model keeps one state and has no keys and values to select from"
ENCODER_DECODER = "an encoder-decoder model attends across two sequences; only decoder-only models are served"
ENCODER = "an encoder reads in both directions and does not decode token by token"
ALIBI = "ALiBi adds a bias that grows with distance to every logit, which the kernels do not"
CHUNKED = "chunked attention restarts its view at every chunk border, which a sliding window cannot express"
COMPRESSED = "its layers attend to compressed keys picked by a learned index, not to every cached key"
DIFFERENTIAL = "differential attention subtracts two softmaxes"
DYNAMIC_MASK = "dynamic-mask attention learns which keys to drop"
NAMED_LAYERS = "alternates global and local layers under names of its own"
PER_LAYER = "its attention differs from layer to layer in ways this reader does not know"
LAYER_SCALED = "it divides the logits by the layer's number, so that no two layers share a kernel"

# Kinds of `layer_types` that are softmax attention over cached keys, and what this project calls them.
SERVABLE_LAYERS = {
    "full_attention": "full_attention",
    "attention": "full_attention",
    "sliding_attention": "sliding_attention",
}


def _hybrid(layers: str) -> str:
    return f"its {layers} layers keep a state instead of keys and values, and only attention layers can be served"


# transformers' model_type, without a trailing `_text`.
MODEL_TYPES: dict[str, str] = {
    "albert": ENCODER,
    "bailing_hybrid": _hybrid("linear-attention"),
    "bamba": _hybrid("Mamba-2"),
    "bart": ENCODER_DECODER,
    "bert": ENCODER,
    "bloom": ALIBI,
    "deberta-v2": ENCODER,
    "deepseek_v4": COMPRESSED,
    "diffllama": DIFFERENTIAL,
    "distilbert": ENCODER,
    "doge": DYNAMIC_MASK,
    "electra": ENCODER,
    "falcon_h1": _hybrid("Mamba-2"),
    "falcon_mamba": STATE_SPACE,
    "gpt_neo": NAMED_LAYERS,
    "jamba": _hybrid("Mamba"),
    "kimi_linear": _hybrid("Kimi Delta Attention"),
    "lfm2": _hybrid("short-convolution"),
    "lfm2_moe": _hybrid("short-convolution"),
    "llama4": CHUNKED,
    "mamba": STATE_SPACE,
    "mamba2": STATE_SPACE,
    "minimax": _hybrid("lightning (linear) attention"),
    "minimax_m3": COMPRESSED,
    "minimax_m3_vl": COMPRESSED,
    "modernbert": ENCODER,
    "mpt": ALIBI,
    "mt5": ENCODER_DECODER,
    "nemotron_h": _hybrid("Mamba-2"),
    "olmo_hybrid": _hybrid("Gated DeltaNet"),
    "qwen3_5": _hybrid("Gated DeltaNet"),
    "qwen3_5_moe": _hybrid("Gated DeltaNet"),
    "qwen3_next": _hybrid("Gated DeltaNet"),
    "recurrent_gemma": _hybrid("RG-LRU"),
    "roberta": ENCODER,
    "rwkv": RECURRENT,
    "t5": ENCODER_DECODER,
    "t5gemma": ENCODER_DECODER,
    "whisper": ENCODER_DECODER,
    "xlm-roberta": ENCODER,
    "xlstm": RECURRENT,
    "zamba": _hybrid("Mamba"),
    "zamba2": _hybrid("Mamba-2"),
}

# Names people type. They get their reason rather than "unknown model".
NAMES: dict[str, str] = {
    "bloom-7b1": ALIBI,
    "bloom-176b": ALIBI,
    "deepseek-r1": MLA,
    "deepseek-v2": MLA,
    "deepseek-v2-lite": MLA,
    "deepseek-v3": MLA,
    "deepseek-v3.1": MLA,
    "deepseek-v3.2": MLA,
    "deepseek-v4-flash": COMPRESSED,
    "deepseek-v4-pro": COMPRESSED,
    "falcon-h1-7b": MODEL_TYPES["falcon_h1"],
    "falcon-mamba-7b": STATE_SPACE,
    "glm-5": MLA,
    "glm-5.1": MLA,
    "glm-5.2": MLA,
    "jamba-mini": MODEL_TYPES["jamba"],
    "jamba-large": MODEL_TYPES["jamba"],
    "kimi-k2": MLA,
    "kimi-k2.5": MLA,
    "kimi-linear-48b-a3b": MODEL_TYPES["kimi_linear"],
    "llama4-maverick": CHUNKED,
    "llama4-scout": CHUNKED,
    "mamba-2.8b": STATE_SPACE,
    "mamba2-2.7b": STATE_SPACE,
    "minimax-m3": COMPRESSED,
    "minimax-text-01": MODEL_TYPES["minimax"],
    "mpt-7b": ALIBI,
    "mpt-30b": ALIBI,
    "nemotron3-nano-30b-a3b": MODEL_TYPES["nemotron_h"],
    "qwen3-next-80b-a3b": MODEL_TYPES["qwen3_next"],
    "qwen3.5-27b": MODEL_TYPES["qwen3_5"],
    "qwen3.5-35b-a3b": MODEL_TYPES["qwen3_5_moe"],
    "qwen3.5-397b-a17b": MODEL_TYPES["qwen3_5_moe"],
    "recurrentgemma-2b": MODEL_TYPES["recurrent_gemma"],
    "rwkv-6": RECURRENT,
    "rwkv-7": RECURRENT,
    "t5-large": ENCODER_DECODER,
    "whisper-large-v3": ENCODER_DECODER,
    "zamba2-7b": MODEL_TYPES["zamba2"],
}

# Keys under which configurations describe attention that differs from layer to layer or drops keys on its own.
_PER_LAYER_KEYS = ("block_configs", "compress_ratios", "hybrid_layer_pattern", "sparse_attention_config")


def why_unservable(model_type: str, values: Mapping[str, object]) -> str | None:
    """The reason a configuration cannot be served, or None."""
    if values.get("is_encoder_decoder"):
        return ENCODER_DECODER
    if values.get("kv_lora_rank"):
        return MLA
    if unservable := _unservable_layers(values.get("layer_types")):
        return unservable
    if model_type in MODEL_TYPES:
        return MODEL_TYPES[model_type]
    attn_config = values.get("attn_config")
    nested_alibi = isinstance(attn_config, Mapping) and attn_config.get("alibi")
    if values.get("alibi") or nested_alibi or values.get("position_embedding_type") == "alibi":
        return ALIBI
    # "vision" lets image tokens see each other; text decoding stays causal.
    if values.get("use_bidirectional_attention") in (True, "all"):
        return ENCODER
    if values.get("scale_attn_by_inverse_layer_idx"):
        return LAYER_SCALED
    if any(values.get(key) for key in _PER_LAYER_KEYS):
        return PER_LAYER
    return None


def _unservable_layers(layer_types: object) -> str | None:
    if not isinstance(layer_types, list):
        return None
    if "chunked_attention" in layer_types:
        return CHUNKED
    others = Counter(str(kind) for kind in layer_types if kind not in SERVABLE_LAYERS)
    if not others:
        return None
    listed = ", ".join(f"{count} {kind}" for kind, count in sorted(others.items()))
    return (
        f"{sum(others.values())} of its {len(layer_types)} layers ({listed}) are not softmax attention over cached keys"
    )
