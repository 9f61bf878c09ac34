"""Rows of the model registry. Every row was read from the public source it names; none is from memory.

`litgpt` and `aiconfigurator` are projects that carry published Hugging Face configurations:
Lightning-AI/litgpt, litgpt/config.py (commit 2685705), and ai-dynamo/aiconfigurator, aic-core's model_configs
(commit 095f58a). A Hugging Face page names the configuration itself, or a derivative's that names its base model.
"""

from __future__ import annotations

from specattn_codegen.models.model_heads import HeadFields, ModelHeads


def _litgpt(repository: str) -> str:
    return f"huggingface.co/{repository} config.json, as in Lightning-AI/litgpt litgpt/config.py"


def _aiconfigurator(repository: str) -> str:
    return f"huggingface.co/{repository} config.json, as in ai-dynamo/aiconfigurator model_configs"


def _page(repository: str, *, base: str | None = None) -> str:
    return f"huggingface.co/{repository} config.json" + (f", which names {base} as its base" if base else "")


def _row(
    name: str,
    heads: tuple[int, int, int],
    layers: int,
    positions: int,
    source: str,
    *,
    full: HeadFields | None = None,
    sliding: HeadFields | None = None,
) -> ModelHeads:
    """A model whose layers are alike, unless `full` and `sliding` give the fields of its two layer kinds."""
    num_q_heads, num_kv_heads, head_dim = heads
    uniform: HeadFields = {"num_q_heads": num_q_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
    kinds: dict[str, HeadFields] = {}
    if sliding is not None:
        kinds["sliding_attention"] = sliding
    if full is not None or sliding is None:
        kinds["full_attention"] = full if full is not None else uniform
    return ModelHeads(name=name, layer_kinds=kinds, source=source, num_layers=layers, max_position_embeddings=positions)


def _gemma2(name: str, heads: tuple[int, int, int], layers: int, repository: str, *, scalar: int) -> ModelHeads:
    """Layers alternate, the first one sliding; logits are capped at 50 and scaled by query_pre_attn_scalar ** -0.5."""
    full = _scaled(heads, scalar)
    full["softcap"] = 50.0
    return _row(name, heads, layers, 8192, _litgpt(repository), full=full, sliding={**full, "window": 4096})


def _gemma3(
    name: str, heads: tuple[int, int, int], layers: int, positions: int, repository: str, *, scalar: int, window: int
) -> ModelHeads:
    """Five sliding layers to one full layer; logits are scaled by query_pre_attn_scalar ** -0.5."""
    full = _scaled(heads, scalar)
    return _row(name, heads, layers, positions, _litgpt(repository), full=full, sliding={**full, "window": window})


def _scaled(heads: tuple[int, int, int], scalar: int) -> HeadFields:
    num_q_heads, num_kv_heads, head_dim = heads
    fields: HeadFields = {"num_q_heads": num_q_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
    if scalar != head_dim:
        fields["scale"] = scalar**-0.5
    return fields


def _gpt_oss(name: str, layers: int) -> ModelHeads:
    """Layers alternate, the first one sliding; every query head has an attention sink."""
    full: HeadFields = {"num_q_heads": 64, "num_kv_heads": 8, "head_dim": 64, "sinks": True}
    source = _aiconfigurator(f"openai/{name}") + "; sinks: transformers' GptOssAttention"
    return _row(name, (64, 8, 64), layers, 131072, source, full=full, sliding={**full, "window": 128})


def _windowed(heads: tuple[int, int, int], window: int) -> HeadFields:
    return {"num_q_heads": heads[0], "num_kv_heads": heads[1], "head_dim": heads[2], "window": window}


def _granite(name: str, heads: tuple[int, int, int], repository: str, base: str, *, multiplier: float) -> ModelHeads:
    """Logits are scaled by attention_multiplier."""
    full: HeadFields = {
        "num_q_heads": heads[0],
        "num_kv_heads": heads[1],
        "head_dim": heads[2],
        "scale": multiplier,
    }
    return _row(name, heads, 40, 131072, _page(repository, base=base), full=full)


ROWS: tuple[ModelHeads, ...] = (
    # Llama
    _row("llama2-7b", (32, 32, 128), 32, 4096, _litgpt("meta-llama/Llama-2-7b-hf")),
    _row("llama2-13b", (40, 40, 128), 40, 4096, _litgpt("meta-llama/Llama-2-13b-hf")),
    _row("llama2-70b", (64, 8, 128), 80, 4096, _litgpt("meta-llama/Llama-2-70b-hf")),
    _row("llama3-8b", (32, 8, 128), 32, 8192, _litgpt("meta-llama/Meta-Llama-3-8B")),
    _row("llama3-70b", (64, 8, 128), 80, 8192, _litgpt("meta-llama/Meta-Llama-3-70B")),
    _row("llama3.1-8b", (32, 8, 128), 32, 131072, _aiconfigurator("meta-llama/Meta-Llama-3.1-8B")),
    _row("llama3.1-70b", (64, 8, 128), 80, 131072, _aiconfigurator("meta-llama/Meta-Llama-3.1-70B")),
    _row("llama3.1-405b", (128, 8, 128), 126, 131072, _aiconfigurator("meta-llama/Meta-Llama-3.1-405B")),
    _row("llama3.2-1b", (32, 8, 64), 16, 131072, _litgpt("meta-llama/Llama-3.2-1B")),
    _row("llama3.2-3b", (24, 8, 128), 28, 131072, _litgpt("meta-llama/Llama-3.2-3B")),
    _row("llama3.3-70b", (64, 8, 128), 80, 131072, _litgpt("meta-llama/Llama-3.3-70B-Instruct")),
    _row("tinyllama-1.1b", (32, 4, 64), 22, 2048, _litgpt("TinyLlama/TinyLlama-1.1B-Chat-v1.0")),
    # Qwen
    _row("qwen2.5-0.5b", (14, 2, 64), 24, 32768, _litgpt("Qwen/Qwen2.5-0.5B")),
    _row("qwen2.5-1.5b", (12, 2, 128), 28, 131072, _litgpt("Qwen/Qwen2.5-1.5B")),
    _row("qwen2.5-3b", (16, 2, 128), 36, 32768, _litgpt("Qwen/Qwen2.5-3B")),
    _row("qwen2.5-7b", (28, 4, 128), 28, 131072, _litgpt("Qwen/Qwen2.5-7B")),
    _row("qwen2.5-14b", (40, 8, 128), 48, 131072, _litgpt("Qwen/Qwen2.5-14B")),
    _row("qwen2.5-32b", (40, 8, 128), 64, 131072, _litgpt("Qwen/Qwen2.5-32B")),
    _row("qwen2.5-72b", (64, 8, 128), 80, 131072, _litgpt("Qwen/Qwen2.5-72B")),
    _row("qwq-32b", (40, 8, 128), 64, 131072, _litgpt("Qwen/QwQ-32B")),
    _row("qwen3-0.6b", (16, 8, 128), 28, 40960, _aiconfigurator("Qwen/Qwen3-0.6B")),
    _row("qwen3-1.7b", (16, 8, 128), 28, 40960, _aiconfigurator("Qwen/Qwen3-1.7B")),
    _row("qwen3-4b", (32, 8, 128), 36, 40960, _litgpt("Qwen/Qwen3-4B")),
    _row("qwen3-8b", (32, 8, 128), 36, 40960, _aiconfigurator("Qwen/Qwen3-8B")),
    _row("qwen3-14b", (40, 8, 128), 40, 40960, _litgpt("Qwen/Qwen3-14B")),
    _row("qwen3-32b", (64, 8, 128), 64, 40960, _aiconfigurator("Qwen/Qwen3-32B")),
    _row("qwen3-30b-a3b", (32, 4, 128), 48, 40960, _aiconfigurator("Qwen/Qwen3-30B-A3B")),
    _row("qwen3-235b-a22b", (64, 4, 128), 94, 40960, _aiconfigurator("Qwen/Qwen3-235B-A22B")),
    _row(
        "qwen3-coder-480b-a35b",
        (96, 8, 128),
        62,
        262144,
        _aiconfigurator("Qwen/Qwen3-Coder-480B-A35B-Instruct"),
    ),
    # DeepSeek-R1 distills
    _row(
        "deepseek-r1-distill-qwen-1.5b",
        (12, 2, 128),
        28,
        131072,
        _page("onnx-community/DeepSeek-R1-Distill-Qwen-1.5B-ONNX", base="deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"),
    ),
    _row(
        "deepseek-r1-distill-qwen-7b",
        (28, 4, 128),
        28,
        131072,
        _page("prithivMLmods/QwQ-R1-Distill-7B-CoT", base="deepseek-ai/DeepSeek-R1-Distill-Qwen-7B"),
    ),
    _row(
        "deepseek-r1-distill-qwen-14b",
        (40, 8, 128),
        48,
        131072,
        _page("RealSafe/RealSafe-R1-14B", base="DeepSeek-R1-Distill-Qwen-14B"),
    ),
    _row(
        "deepseek-r1-distill-qwen-32b",
        (40, 8, 128),
        64,
        131072,
        _page("AIFunOver/DeepSeek-R1-Distill-Qwen-32B-openvino-8bit", base="deepseek-ai/DeepSeek-R1-Distill-Qwen-32B"),
    ),
    _row("deepseek-r1-distill-llama-8b", (32, 8, 128), 32, 131072, _litgpt("deepseek-ai/DeepSeek-R1-Distill-Llama-8B")),
    _row(
        "deepseek-r1-distill-llama-70b", (64, 8, 128), 80, 131072, _litgpt("deepseek-ai/DeepSeek-R1-Distill-Llama-70B")
    ),
    # Mistral
    _row(
        "mistral-7b-v0.1",
        (32, 8, 128),
        32,
        32768,
        _page("dmayboroda/42_mistral_0.1", base="mistralai/Mistral-7B-v0.1"),
        sliding=_windowed((32, 8, 128), 4096),
    ),
    _row("mistral-7b-v0.3", (32, 8, 128), 32, 32768, _litgpt("mistralai/Mistral-7B-v0.3")),
    _row(
        "mistral-nemo-12b",
        (32, 8, 128),
        40,
        128000,
        "huggingface.co/mistralai/Mistral-Nemo-Base-2407 config.json, as in kevinstephano/thunder_model_blocks "
        "mistral/mistral_config.py",
    ),
    _row(
        "mistral-small-24b",
        (32, 8, 128),
        40,
        32768,
        _page("unsloth/Mistral-Small-24B-Instruct-2501-GGUF", base="mistralai/Mistral-Small-24B-Instruct-2501"),
    ),
    _row("mistral-large-123b", (96, 8, 128), 88, 32768, _litgpt("mistralai/Mistral-Large-Instruct-2407")),
    _row("mixtral-8x7b", (32, 8, 128), 32, 32768, _aiconfigurator("mistralai/Mixtral-8x7B-v0.1")),
    _row("mixtral-8x22b", (48, 8, 128), 56, 65536, _aiconfigurator("mistralai/Mixtral-8x22B-v0.1")),
    # Gemma
    _gemma2("gemma2-2b", (8, 4, 256), 26, "google/gemma-2-2b", scalar=256),
    _gemma2("gemma2-9b", (16, 8, 256), 42, "google/gemma-2-9b", scalar=256),
    _gemma2("gemma2-27b", (32, 16, 128), 46, "google/gemma-2-27b", scalar=144),
    _gemma3("gemma3-1b", (4, 1, 256), 26, 131072, "google/gemma-3-1b-it", scalar=256, window=512),
    _gemma3("gemma3-4b", (8, 4, 256), 34, 131072, "google/gemma-3-4b-it", scalar=256, window=1024),
    _gemma3("gemma3-12b", (16, 8, 256), 48, 131072, "google/gemma-3-12b-it", scalar=256, window=1024),
    _gemma3("gemma3-27b", (32, 16, 128), 62, 131072, "google/gemma-3-27b-it", scalar=168, window=1024),
    _row(
        "gemma4-26b-a4b",
        (16, 8, 256),
        30,
        262144,
        _aiconfigurator("google/gemma-4-26B-A4B") + "; scale 1: transformers' Gemma4TextAttention",
        full={"num_q_heads": 16, "num_kv_heads": 2, "head_dim": 512, "scale": 1.0},
        sliding={"num_q_heads": 16, "num_kv_heads": 8, "head_dim": 256, "scale": 1.0, "window": 1024},
    ),
    # Phi
    _row(
        "phi3-mini-4k",
        (32, 32, 96),
        32,
        4096,
        _page("Alignment-Lab-AI/idfkphi4kiguess", base="Phi-3-mini-4k-instruct"),
        sliding=_windowed((32, 32, 96), 2047),
    ),
    _row("phi3-mini-128k", (32, 32, 96), 32, 131072, _litgpt("microsoft/Phi-3-mini-128k-instruct")),
    _row("phi4", (40, 10, 128), 40, 16384, _litgpt("microsoft/phi-4")),
    _row("phi4-mini", (24, 8, 128), 32, 131072, _litgpt("microsoft/Phi-4-mini-instruct")),
    # gpt-oss
    _gpt_oss("gpt-oss-20b", 24),
    _gpt_oss("gpt-oss-120b", 36),
    # Others
    _row("falcon-7b", (71, 1, 64), 32, 2048, _litgpt("tiiuae/falcon-7b")),
    _row("falcon-40b", (128, 8, 64), 60, 2048, _litgpt("tiiuae/falcon-40b")),
    _row("falcon3-7b", (12, 4, 256), 28, 32768, _litgpt("tiiuae/Falcon3-7B-Base")),
    _granite(
        "granite3.2-2b",
        (32, 8, 64),
        "unsloth/granite-3.2-2b-instruct",
        "ibm-granite/granite-3.2-2b-instruct",
        multiplier=0.015625,
    ),
    _granite(
        "granite3.2-8b",
        (32, 8, 128),
        "huihui-ai/granite-3.2-8b-instruct-abliterated",
        "granite-3.2-8b-instruct",
        multiplier=0.0078125,
    ),
    _row("mimo-7b", (32, 8, 128), 36, 32768, _aiconfigurator("XiaomiMiMo/MiMo-7B-Base")),
    _row("minimax-m2.5", (48, 8, 128), 62, 196608, _aiconfigurator("MiniMaxAI/MiniMax-M2.5")),
    _row("olmo2-7b", (32, 32, 128), 32, 4096, _litgpt("allenai/OLMo-2-1124-7B")),
    _row("olmo2-13b", (40, 40, 128), 40, 4096, _page("allenai/OLMo-2-1124-13B")),
    _row("smollm2-135m", (9, 3, 64), 30, 8192, _litgpt("HuggingFaceTB/SmolLM2-135M")),
    _row("smollm2-360m", (15, 5, 64), 32, 8192, _page("unsloth/SmolLM2-360M", base="HuggingFaceTB/SmolLM2-360M")),
    _row("smollm2-1.7b", (32, 32, 64), 24, 8192, _litgpt("HuggingFaceTB/SmolLM2-1.7B")),
    _row("yi-34b", (56, 8, 128), 60, 4096, _page("01-ai/Yi-34B")),
    _row("yi1.5-34b", (56, 8, 128), 60, 4096, _page("01-ai/Yi-1.5-34B-Chat")),
)
