"""The model registry and the reader of configurations, against transformers' own configurations and modules."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.masking_utils import sliding_window_causal_mask_function

from specattn_codegen import models
from specattn_codegen.errors import SpecError
from specattn_codegen.heads import HeadConfig, layer_heads
from specattn_codegen.models import model_config, model_refusals
from specattn_codegen.models.model_defaults import DEFAULTS
from specattn_codegen.models.model_registry import ROWS

FAMILIES = (
    "deepseek-r1-distill",
    "gemma2",
    "gemma3",
    "gpt-oss",
    "llama2",
    "llama3-",
    "llama3.1",
    "llama3.2",
    "llama3.3",
    "mistral-7b",
    "mixtral",
    "olmo2",
    "phi4",
    "qwen2.5",
    "qwen3-",
    "tinyllama",
)


def write(folder: Path, values: object) -> str:
    path = folder / "config.json"
    path.write_text(json.dumps(values))
    return str(path)


def refusal(model: str) -> str:
    """The message of the SpecError that resolving `model` raises; one line, as the command line prints it."""
    with pytest.raises(SpecError) as caught:
        layer_heads(model)
    message = str(caught.value)
    assert "\n" not in message
    return message


# The registry.


def test_the_families_people_use_are_registered() -> None:
    assert len(models.names()) >= 60
    assert list(models.names()) == sorted(models.names())
    for family in FAMILIES:
        assert any(name.startswith(family) for name in models.names()), family


def test_no_two_names_share_a_spelling() -> None:
    spellings = [models.canonical(name) for name in (*models.names(), *model_refusals.NAMES)]
    assert len(set(spellings)) == len(spellings)


@pytest.mark.parametrize("name", models.names())
def test_every_row_makes_heads_and_names_its_source(name: str) -> None:
    row = models.resolve(name)
    kinds = layer_heads(name)
    assert kinds.keys() == row.layer_kinds.keys() <= {"full_attention", "sliding_attention"}
    assert len(row.source) > 30
    assert ".co/" in row.source or "github" in row.source
    assert row.num_layers >= 12
    assert row.max_position_embeddings is not None
    for kind, heads in kinds.items():
        assert heads.head_dim % 8 == 0
        assert heads.num_q_heads % heads.num_kv_heads == 0
        assert (heads.window is not None) == (kind == "sliding_attention")
        if heads.window is not None:
            assert heads.window < row.max_position_embeddings


# Configuration classes of transformers whose defaults are a published checkpoint's values.
@pytest.mark.parametrize(
    ("name", "model_type", "kind"),
    [
        ("falcon-7b", "falcon", "full_attention"),
        ("gemma2-2b", "gemma2", "sliding_attention"),
        ("gpt-oss-120b", "gpt_oss", "sliding_attention"),
        ("llama2-7b", "llama", "full_attention"),
        ("minimax-m2.5", "minimax_m2", "full_attention"),
        ("mistral-7b-v0.1", "mistral", "sliding_attention"),
        ("mixtral-8x7b", "mixtral", "full_attention"),
        ("olmo2-7b", "olmo2", "full_attention"),
    ],
)
def test_rows_agree_with_the_defaults_of_transformers(name: str, model_type: str, kind: str, tmp_path: Path) -> None:
    CONFIG_MAPPING[model_type]().to_json_file(tmp_path / "config.json")
    assert layer_heads(str(tmp_path))[kind] == layer_heads(name)[kind]
    assert models.resolve(str(tmp_path)).num_layers == models.resolve(name).num_layers


# Published parameter counts tie heads, layers and widths together: q, k, v and o projections of every layer.
@pytest.mark.parametrize(
    ("name", "hidden_size", "attention_parameters"),
    [("llama3-8b", 4096, 1_342_177_280), ("qwen3-0.6b", 1024, 176_160_768), ("gemma2-27b", 4608, 2_604_662_784)],
)
def test_heads_and_layers_make_the_models_attention_weights(
    name: str, hidden_size: int, attention_parameters: int
) -> None:
    heads = HeadConfig.from_model(name)
    widths = 2 * heads.num_q_heads * heads.head_dim + 2 * heads.num_kv_heads * heads.head_dim
    assert models.resolve(name).num_layers * hidden_size * widths == attention_parameters


def test_gemma2_has_a_cap_a_window_and_a_scale_of_its_own() -> None:
    kinds = layer_heads("gemma2-27b")
    assert kinds["full_attention"] == HeadConfig(
        num_q_heads=32, num_kv_heads=16, head_dim=128, scale=144**-0.5, softcap=50.0
    )
    assert kinds["sliding_attention"].window == 4096
    # 9B's query_pre_attn_scalar equals its head_dim, so its scale is the usual one.
    assert layer_heads("gemma2-9b")["full_attention"].scale == 1 / math.sqrt(256)


def test_a_model_of_two_kinds_means_its_full_attention() -> None:
    assert HeadConfig.from_model("gpt-oss-20b") == HeadConfig(num_q_heads=64, num_kv_heads=8, head_dim=64, sinks=True)
    assert HeadConfig.from_model("gpt-oss-20b", layer_kind="sliding_attention").window == 128
    with pytest.raises(SpecError, match=r"chunked.*gpt-oss-20b has sliding_attention, full_attention"):
        HeadConfig.from_model("gpt-oss-20b", layer_kind="chunked")


@pytest.mark.parametrize(
    ("name", "tp", "shard"),
    [
        ("llama3-8b", 1, (32, 8)),
        ("llama3-8b", 8, (4, 1)),
        ("llama3-8b", 16, (2, 1)),
        ("llama3.1-70b", 8, (8, 1)),
        ("qwen2.5-7b", 4, (7, 1)),
        ("qwen3-235b-a22b", 8, (8, 1)),
        ("llama2-7b", 4, (8, 8)),
    ],
)
def test_ranks_split_heads_and_replicate_what_is_too_few(name: str, tp: int, shard: tuple[int, int]) -> None:
    heads = HeadConfig.from_model(name, tp=tp)
    assert (heads.num_q_heads, heads.num_kv_heads) == shard
    assert heads.head_dim == HeadConfig.from_model(name).head_dim


@pytest.mark.parametrize(("name", "tp"), [("qwen2.5-7b", 8), ("llama3-8b", 3), ("falcon-7b", 2), ("llama3-8b", 0)])
def test_ranks_that_do_not_divide_are_refused(name: str, tp: int) -> None:
    with pytest.raises(SpecError, match=f"tp={tp}"):
        HeadConfig.from_model(name, tp=tp)


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("LLaMA3-8B", "llama3-8b"),
        ("llama-3-8b", "llama3-8b"),
        ("llama_3.1 8b", "llama3.1-8b"),
        ("meta-llama/Meta-Llama-3-8B-Instruct", "llama3-8b"),
        ("mistralai/Mistral-7B-Instruct-v0.3", "mistral-7b-v0.3"),
        ("Qwen/Qwen2.5-7B", "qwen2.5-7b"),
        ("google/gemma-2-9b-it", "gemma2-9b"),
        ("openai/gpt-oss-20b", "gpt-oss-20b"),
        ("microsoft/phi-4", "phi4"),
    ],
)
def test_usual_spellings_find_the_row(spelling: str, name: str) -> None:
    assert models.resolve(spelling).name == name


# The reader, against what transformers builds from the same file.

SMALL = {"hidden_size": 96, "intermediate_size": 64, "num_attention_heads": 6, "vocab_size": 64, "pad_token_id": 0}
SMALL |= {"bos_token_id": 1, "eos_token_id": 2}
CASES: dict[str, tuple[str, dict[str, object]]] = {
    "llama-mha": ("llama", {"num_hidden_layers": 2}),
    "llama-gqa": ("llama", {"num_hidden_layers": 2, "num_key_value_heads": 2}),
    "llama-head-dim": ("llama", {"num_hidden_layers": 2, "num_key_value_heads": 3, "head_dim": 24}),
    "mistral-windowed": ("mistral", {"num_hidden_layers": 2, "num_key_value_heads": 2, "sliding_window": 48}),
    "mistral-full": ("mistral", {"num_hidden_layers": 2, "num_key_value_heads": 2, "sliding_window": None}),
    "mixtral": ("mixtral", {"num_hidden_layers": 2, "num_key_value_heads": 2, "sliding_window": 40}),
    "qwen2": ("qwen2", {"num_hidden_layers": 3, "num_key_value_heads": 2, "sliding_window": 32}),
    "qwen2-windowed": (
        "qwen2",
        {
            "num_hidden_layers": 4,
            "num_key_value_heads": 2,
            "sliding_window": 32,
            "use_sliding_window": True,
            "max_window_layers": 3,
        },
    ),
    "qwen3": ("qwen3", {"num_hidden_layers": 2, "num_key_value_heads": 3}),
    "qwen3-moe": ("qwen3_moe", {"num_hidden_layers": 2, "num_key_value_heads": 2, "head_dim": 32, "num_experts": 2}),
    "qwen3-moe-windowed": (
        "qwen3_moe",
        {
            "num_hidden_layers": 2,
            "num_key_value_heads": 2,
            "num_experts": 2,
            "use_sliding_window": True,
            "sliding_window": 16,
        },
    ),
    "gemma": ("gemma", {"num_hidden_layers": 2, "num_key_value_heads": 1, "head_dim": 40}),
    "gemma2": (
        "gemma2",
        {"num_hidden_layers": 3, "num_key_value_heads": 2, "query_pre_attn_scalar": 20, "sliding_window": 24},
    ),
    "gemma3": (
        "gemma3_text",
        {
            "num_hidden_layers": 7,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "query_pre_attn_scalar": 17,
            "sliding_window": 24,
        },
    ),
    "gpt-oss": (
        "gpt_oss",
        {"num_hidden_layers": 3, "num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 2, "sliding_window": 8},
    ),
    "granite": ("granite", {"num_hidden_layers": 2, "num_key_value_heads": 2, "attention_multiplier": 0.0625}),
    "cohere2": ("cohere2", {"num_hidden_layers": 5, "num_key_value_heads": 2, "sliding_window": 24}),
    "olmo2": ("olmo2", {"num_hidden_layers": 2, "num_key_value_heads": 3}),
    "olmo3": ("olmo3", {"num_hidden_layers": 4, "num_key_value_heads": 3, "sliding_window": 24}),
    "phi3": ("phi3", {"num_hidden_layers": 2, "num_key_value_heads": 2, "sliding_window": 24}),
    "smollm3": ("smollm3", {"num_hidden_layers": 5, "num_key_value_heads": 2}),
    "starcoder2": ("starcoder2", {"num_hidden_layers": 2, "num_key_value_heads": 2, "sliding_window": 24}),
    "stablelm": ("stablelm", {"num_hidden_layers": 2, "num_key_value_heads": 2}),
    "glm4": ("glm4", {"num_hidden_layers": 2, "num_key_value_heads": 2, "head_dim": 32}),
}


def small(case: str) -> PreTrainedConfig:
    model_type, values = CASES[case]
    return CONFIG_MAPPING[model_type].from_dict({**SMALL, "max_position_embeddings": 512, **values})


def built_layers(config: PreTrainedConfig) -> list[tuple[str, tuple[int, int, float, int | None, bool]]]:
    """Kind, head_dim, KV group, scale, window and sinks of every attention layer of the model transformers builds."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    kinds = getattr(config, "layer_types", None)
    layers = []
    for module in model.modules():
        if not hasattr(module, "layer_idx") or not hasattr(module, "num_key_value_groups"):
            continue
        # Models whose layers are alike keep the window in the configuration.
        window = getattr(module, "sliding_window", None if kinds else getattr(config, "sliding_window", None))
        facts = (module.head_dim, module.num_key_value_groups, float(module.scaling), window, hasattr(module, "sinks"))
        layers.append(("sliding_attention" if window else "full_attention", facts))
    return layers


@pytest.mark.parametrize("case", CASES)
def test_the_reader_sees_what_transformers_builds(case: str, tmp_path: Path) -> None:
    config = small(case)
    config.to_json_file(tmp_path / "config.json")
    expected = built_layers(AutoConfig.from_pretrained(tmp_path))
    kinds = layer_heads(str(tmp_path / "config.json"))
    assert models.resolve(str(tmp_path)).num_layers == len(expected) == config.num_hidden_layers
    assert kinds.keys() == {kind for kind, _ in expected}
    for kind, facts in expected:
        heads = kinds[kind]
        assert heads.num_q_heads == config.num_attention_heads
        assert (heads.head_dim, heads.group, heads.window, heads.sinks) == (facts[0], facts[1], facts[3], facts[4])
        assert heads.scale == pytest.approx(facts[2], rel=1e-6)
        assert heads.softcap == getattr(config, "attn_logit_softcapping", None)


@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text", "cohere2", "gpt_oss", "olmo3", "exaone4", "afmoe"])
def test_missing_layer_types_follow_transformers(model_type: str, tmp_path: Path) -> None:
    values: dict[str, object] = {**SMALL, "num_hidden_layers": 12, "num_key_value_heads": 2, "sliding_window": 24}
    expected = CONFIG_MAPPING[model_type].from_dict(values).layer_types
    path = write(tmp_path, {**values, "model_type": model_type, "max_position_embeddings": 512})
    assert models.resolve(path).layer_kinds.keys() == set(expected)
    config = model_config._language_model(json.loads(Path(path).read_text()), path)
    assert model_config._kinds_by_layer(config, 12) == expected


@pytest.mark.parametrize("model_type", sorted(DEFAULTS))
def test_defaults_are_those_of_transformers(model_type: str) -> None:
    config_class = CONFIG_MAPPING[f"{model_type}_text" if f"{model_type}_text" in CONFIG_MAPPING else model_type]
    for key, value in DEFAULTS[model_type].items():
        # Classes overwrite their sliding_window when use_sliding_window is off; the class attribute is untouched.
        assert getattr(config_class, key) == value, key


def test_the_window_counts_the_row_itself() -> None:
    heads = layer_heads("mistral-7b-v0.1")["sliding_attention"]
    assert heads.window == 4096
    mask = sliding_window_causal_mask_function(4096)
    position = torch.tensor(10_000)
    seen = sum(bool(mask(0, 0, position, torch.tensor(key))) for key in range(5_900, 10_001))
    assert seen == heads.window


def test_gemma4_global_layers_have_heads_of_their_own(tmp_path: Path) -> None:
    values = {
        **SMALL,
        "model_type": "gemma4_text",
        "num_hidden_layers": 6,
        "num_key_value_heads": 3,
        "head_dim": 16,
        "global_head_dim": 32,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "sliding_window": 24,
        "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
        "max_position_embeddings": 512,
    }
    kinds = layer_heads(write(tmp_path, values))
    built = CONFIG_MAPPING["gemma4_text"].from_dict(values)
    for index, kind in ((0, "sliding_attention"), (5, "full_attention")):
        layer = built.per_layer_config[index]
        assert (kinds[kind].num_kv_heads, kinds[kind].head_dim) == (layer.num_key_value_heads, layer.head_dim)
        assert kinds[kind].scale == 1.0
    built.to_json_file(tmp_path / "config.json")
    assert layer_heads(str(tmp_path)) == kinds


def test_the_language_model_of_a_multimodal_one_is_read(tmp_path: Path) -> None:
    # As google/gemma-3-4b-it was published: the heads are the class's defaults.
    text = {"hidden_size": 2560, "model_type": "gemma3_text", "num_hidden_layers": 34, "sliding_window": 1024}
    values = {"model_type": "gemma3", "vision_config": {"num_attention_heads": 16}, "text_config": text}
    assert layer_heads(write(tmp_path, values)) == layer_heads("gemma3-4b")


@pytest.mark.parametrize(
    ("values", "heads"),
    [
        ({"model_type": "gpt2", "n_head": 12, "n_embd": 768, "n_layer": 12, "n_positions": 1024}, (12, 12, 64)),
        ({"model_type": "gpt_bigcode", "n_head": 48, "n_embd": 6144, "n_layer": 40}, (48, 1, 128)),
        (
            {
                "model_type": "falcon",
                "num_attention_heads": 71,
                "num_kv_heads": 71,
                "hidden_size": 4544,
                "num_hidden_layers": 32,
                "multi_query": True,
                "new_decoder_architecture": False,
            },
            (71, 1, 64),
        ),
        (
            {
                "model_type": "falcon",
                "num_attention_heads": 128,
                "num_kv_heads": 8,
                "hidden_size": 8192,
                "num_hidden_layers": 60,
                "new_decoder_architecture": True,
            },
            (128, 8, 64),
        ),
        (
            {"model_type": "dbrx", "n_heads": 48, "d_model": 6144, "n_layers": 40, "attn_config": {"kv_n_heads": 8}},
            (48, 8, 128),
        ),
        (
            {
                "model_type": "chatglm",
                "num_attention_heads": 32,
                "hidden_size": 4096,
                "num_layers": 28,
                "kv_channels": 128,
                "multi_query_attention": True,
                "multi_query_group_num": 2,
            },
            (32, 2, 128),
        ),
    ],
)
def test_older_words_for_heads_are_read(values: dict[str, object], heads: tuple[int, int, int], tmp_path: Path) -> None:
    q, kv, head_dim = heads
    expected = HeadConfig(num_q_heads=q, num_kv_heads=kv, head_dim=head_dim)
    assert layer_heads(write(tmp_path, values)) == {"full_attention": expected}


def test_a_window_as_long_as_the_context_is_no_window(tmp_path: Path) -> None:
    values = {"model_type": "phi3", "num_attention_heads": 32, "hidden_size": 3072, "num_hidden_layers": 32}
    values |= {"sliding_window": 262144, "max_position_embeddings": 131072}
    assert layer_heads(write(tmp_path, values)) == layer_heads("phi3-mini-128k")


def test_what_is_on_disk_wins_over_the_registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "llama3-8b"
    folder.mkdir()
    monkeypatch.chdir(tmp_path)
    assert models.resolve("llama3-8b").name == "llama3-8b"
    assert "Lightning-AI/litgpt" in models.resolve("llama3-8b").source
    write(folder, {"model_type": "llama", "num_attention_heads": 4, "hidden_size": 256, "num_hidden_layers": 2})
    assert layer_heads("llama3-8b")["full_attention"].head_dim == 64


# What is refused, and with what words.


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("deepseek-v3", "latent attention"),
        ("deepseek-ai/DeepSeek-R1", "latent attention"),
        ("moonshotai/Kimi-K2-Instruct", "latent attention"),
        ("mamba-2.8b", "state-space"),
        ("rwkv-7", "recurrent"),
        ("qwen3-next-80b-a3b", "Gated DeltaNet layers"),
        ("llama4-scout", "chunk border"),
        ("mpt-7b", "ALiBi"),
        ("whisper-large-v3", "encoder-decoder"),
    ],
)
def test_known_models_that_cannot_be_served_say_why(name: str, reason: str) -> None:
    message = refusal(name)
    assert "cannot be served" in message
    assert reason in message


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("deepseek_v3", "latent attention"),
        ("mamba2", "state-space"),
        ("rwkv", "recurrent"),
        ("jamba", "Mamba"),
        ("zamba2", "Mamba-2"),
        ("nemotron_h", "Mamba-2"),
        ("qwen3_next", "36 of its 48 layers (36 linear_attention)"),
        ("llama4_text", "chunk border"),
        ("bloom", "ALiBi"),
        ("mpt", "ALiBi"),
        ("t5", "encoder-decoder"),
        ("whisper", "encoder-decoder"),
        ("bert", "both directions"),
    ],
)
def test_configurations_that_cannot_be_served_say_why(model_type: str, reason: str, tmp_path: Path) -> None:
    CONFIG_MAPPING[model_type]().to_json_file(tmp_path / "config.json")
    message = refusal(str(tmp_path))
    assert "cannot be served" in message
    assert reason in message


LLAMA = {"model_type": "llama", "num_attention_heads": 32, "hidden_size": 4096, "num_hidden_layers": 32}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_attention_heads": None}, "no attention heads (num_attention_heads)"),
        ({"num_hidden_layers": None}, "no number of layers"),
        ({"hidden_size": None}, "neither head_dim nor hidden_size"),
        ({"hidden_size": 4097}, "hidden_size=4097 is no multiple of 32"),
        ({"num_attention_heads": "32"}, "num_attention_heads='32': must be a whole number"),
        ({"num_attention_heads": 32.5}, "num_attention_heads=32.5"),
        ({"num_attention_heads": True}, "num_attention_heads=True"),
        ({"num_attention_heads": 0}, "num_attention_heads=0"),
        ({"num_attention_heads": -4}, "num_attention_heads=-4"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000"),
        ({"num_key_value_heads": 5}, "query heads must be a multiple of KV heads"),
        ({"head_dim": 10**6}, "head_dim=1000000"),
        ({"attention_multiplier": "big"}, "attention_multiplier='big'"),
        ({"attention_multiplier": float("nan")}, "attention_multiplier=nan"),
        ({"layer_types": ["full_attention"]}, "layer_types names 1 of 32 layers"),
        ({"layer_types": ["sliding_attention"] * 32}, "no sliding_window"),
        ({"layer_types": ["conv"] * 30 + ["full_attention"] * 2}, "30 of its 32 layers (30 conv)"),
        ({"layer_types": ["chunked_attention"] * 32}, "chunk border"),
        ({"alibi": True}, "ALiBi"),
        ({"is_encoder_decoder": True}, "encoder-decoder"),
        ({"kv_lora_rank": 512}, "latent attention"),
        ({"block_configs": [{}]}, "layer to layer"),
        ({"use_bidirectional_attention": True}, "both directions"),
        ({"per_layer_config": {"7": {"head_dim": 64}}}, "full_attention layers differ among themselves"),
    ],
)
def test_damaged_configurations_are_refused_in_one_line(changes: dict[str, object], words: str, tmp_path: Path) -> None:
    assert words in refusal(write(tmp_path, {**LLAMA, **changes}))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not valid JSON"),
        (b'{"num_attention_heads": 32', "not valid JSON"),
        (b"[1, 2]", "holds no JSON object"),
        (b"\xff\xfe\x00", "cannot be read"),
        (b"{}", "no number of layers"),
        (b"[" * 100_000, "not valid JSON"),
    ],
)
def test_files_that_are_no_configuration_are_refused(content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    message = refusal(str(path))
    assert words in message
    assert str(path) in message


def test_missing_files_and_folders_are_named(tmp_path: Path) -> None:
    assert "no such file or folder" in refusal(str(tmp_path / "missing"))
    assert "no such file or folder" in refusal("missing.json")
    assert f"{tmp_path / 'config.json'}: no such file" in refusal(str(tmp_path))


def test_unknown_names_get_the_nearest_ones() -> None:
    message = refusal("lama3-8b")
    assert "did you mean llama3-8b" in message
    assert "--heads 32,8,128" in message
    assert "--list-models` shows all" in refusal("xyzzy")
    assert "give a name" in refusal(" ")


# --heads


@pytest.mark.parametrize(
    ("text", "heads"),
    [
        ("32,8,128", HeadConfig(num_q_heads=32, num_kv_heads=8, head_dim=128)),
        (" 24, 8,80 ", HeadConfig(num_q_heads=24, num_kv_heads=8, head_dim=80)),
        ("16,2,192,128", HeadConfig(num_q_heads=16, num_kv_heads=2, head_dim=192, v_head_dim=128)),
    ],
)
def test_heads_are_read_from_numbers(text: str, heads: HeadConfig) -> None:
    assert HeadConfig(**models.parse_heads(text)) == heads


@pytest.mark.parametrize(
    "text", ["", "32", "32,8", "32,8,128,128,1", "32,8,x", "32,,128", "32,8,0", "32,-8,128", "32,8,1.5", "32,8,999999"]
)
def test_numbers_that_are_no_heads_are_refused(text: str) -> None:
    with pytest.raises(SpecError, match="as in 32,8,128"):
        models.parse_heads(text)


def test_rows_are_written_in_their_one_spelling() -> None:
    assert all(row.name == row.name.lower() and " " not in row.name for row in ROWS)
