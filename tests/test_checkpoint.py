"""Checkpoints: whole ones load bitwise, from one file or several; broken ones are refused in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from specattn_codegen.errors import CheckpointError, SpecAttnError, SpecError
from specattn_runtime.model.checkpoint import build_llama, load_llama
from specattn_runtime.model.llama_config import parse_config
from specattn_runtime.model.tokens import ByteCodec, codec_of
from tiny_models import CONFIG, STRETCHED, TRAINED, same_tensors, save_checkpoint, wavy_llama, wavy_tensors


@pytest.mark.parametrize("fields", [CONFIG, STRETCHED])
def test_one_file_loads_bitwise(fields: dict[str, object], tmp_path: Path) -> None:
    save_checkpoint(tmp_path, fields)
    assert same_tensors(load_llama(tmp_path, dtype=torch.float64), wavy_llama(fields))


def test_shards_load_as_one_file_does(tmp_path: Path) -> None:
    tensors = save_checkpoint(tmp_path, STRETCHED)
    (tmp_path / "model.safetensors").unlink()
    write_shards(tmp_path, tensors)
    assert same_tensors(load_llama(tmp_path, dtype=torch.float64), wavy_llama(STRETCHED))


def write_shards(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    names = sorted(tensors)
    files = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in files.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    weight_map = {name: file for file, part in files.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_tensors_that_carry_nothing_are_skipped(tmp_path: Path) -> None:
    tensors = save_checkpoint(tmp_path)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    assert same_tensors(load_llama(tmp_path, dtype=torch.float64), wavy_llama())


def test_old_and_new_config_fields_mean_the_same() -> None:
    old = {**CONFIG, "rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}, "torch_dtype": "float16"}
    new = {key: value for key, value in CONFIG.items() if key != "rope_theta"}
    new |= {"rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}, "dtype": "float16"}
    assert parse_config(old) == parse_config(new)


def test_absent_fields_have_the_architectures_defaults() -> None:
    fields = {
        key: value for key, value in CONFIG.items() if key not in ("head_dim", "num_key_value_heads", "rope_theta")
    }
    config = parse_config({**fields, "head_dim": None, "eos_token_id": [3, 4]})
    assert (config.heads.head_dim, config.heads.num_kv_heads, config.rope.theta) == (8, 6, 10_000.0)
    assert config.stop_tokens == {3, 4}


def test_mistral_without_a_window_is_a_llama() -> None:
    mistral = {**CONFIG, "architectures": ["MistralForCausalLM"], "sliding_window": None}
    assert parse_config(mistral) == parse_config(CONFIG)
    assert parse_config({**mistral, "sliding_window": 256}) == parse_config(CONFIG)  # never shorter than a text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "architectures=.*only LlamaForCausalLM and MistralForCausalLM"),
        ({"architectures": None}, "architectures=None"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"sliding_window": 128}, "sliding_window=128"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type='yarn': not supported"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope_type='dynamic': not supported"),
        ({"rope_scaling": {"rope_type": "linear"}}, "factor=None must be a number"),
        ({"rope_scaling": "linear"}, "rope_scaling='linear'"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ({"num_attention_heads": None}, "num_attention_heads=None must be a whole number"),
        ({"num_attention_heads": 7}, "query heads must be a multiple"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0"),
        ({"vocab_size": "many"}, "vocab_size='many'"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps='small'"),
        ({"head_dim": 7}, "head_dim=7"),
        ({"attention_bias": "yes"}, "attention_bias='yes'"),
        ({"eos_token_id": "</s>"}, "eos_token_id='</s>'"),
    ],
)
def test_configs_that_cannot_run_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(SpecAttnError, match=message) as refusal:
        parse_config({**CONFIG, **changes})
    assert "\n" not in str(refusal.value)


def truncate(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def scribble(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\xff" * 500)


def drop_tensor(folder: Path) -> None:
    tensors = save_checkpoint(folder)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors")


def add_tensor(folder: Path) -> None:
    tensors = save_checkpoint(folder)
    save_file({**tensors, "model.layers.0.self_attn.q_norm.weight": torch.ones(8)}, folder / "model.safetensors")


def misshape(folder: Path) -> None:
    tensors = save_checkpoint(folder)
    save_file({**tensors, "model.norm.weight": torch.ones(47)}, folder / "model.safetensors")


def integers(folder: Path) -> None:
    tensors = save_checkpoint(folder)
    save_file({**tensors, "model.norm.weight": torch.ones(48, dtype=torch.int8)}, folder / "model.safetensors")


def lose_shard(folder: Path) -> None:
    write_shards(folder, save_checkpoint(folder))
    (folder / "model.safetensors").unlink()
    (folder / "b.safetensors").unlink()


def escape_folder(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../a.safetensors"}}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "model.safetensors: corrupt or truncated"),
        (scribble, "model.safetensors: corrupt or truncated"),
        (drop_tensor, "tensor model.layers.1.mlp.up_proj.weight is missing"),
        (add_tensor, "q_norm.weight is no part of the Llama"),
        (misshape, r"tensor model.norm.weight is \[47\]; config.json asks for \[48\]"),
        (integers, "tensor model.norm.weight is I8"),
        (lose_shard, "b.safetensors: missing, 1 of 2 files are"),
        (escape_folder, "weight_map must name, for each tensor, a file of this folder"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no model.safetensors"),
        (lambda folder: (folder / "config.json").unlink(), "no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json: not JSON"),
        (lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe"), "config.json: not JSON"),
        (lambda folder: (folder / "config.json").write_text("[]"), "config.json: must hold a JSON object"),
    ],
)
def test_broken_checkpoints_are_refused(damage: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    save_checkpoint(tmp_path)
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=message) as refusal:
        load_llama(tmp_path, dtype=torch.float32)
    assert "\n" not in str(refusal.value)


def test_weights_of_different_dtypes_make_no_model() -> None:
    tensors = wavy_tensors(parse_config(CONFIG))
    tensors["model.layers.1.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"].bfloat16()
    with pytest.raises(SpecError, match=r"up_proj.weight is torch.bfloat16 on cpu: a model has one dtype and one"):
        build_llama(parse_config(CONFIG), tensors)


def test_a_missing_folder() -> None:
    with pytest.raises(CheckpointError, match="nowhere: no such folder"):
        load_llama("nowhere", dtype=torch.float32)


def test_the_trained_checkpoint_holds_what_its_config_says() -> None:
    model = load_llama(TRAINED, dtype=torch.float32)
    assert sum(tensor.numel() for tensor in [model.embedding, model.norm]) == 256 * 256 + 256
    assert model.head is model.embedding
    assert isinstance(codec_of(TRAINED, model.config), ByteCodec)


def test_bytes_are_tokens_and_tokens_bytes() -> None:
    text = "naïve\x00\n"
    assert ByteCodec().encode(text.encode()) == list(text.encode())
    assert ByteCodec().decode(list(text.encode())) == text
    assert ByteCodec().decode([0x61, 0xFF, 0x62]) == "a\ufffdb"


def test_a_vocabulary_that_is_not_bytes_needs_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json, and vocab_size=300"):
        codec_of(tmp_path, parse_config({**CONFIG, "vocab_size": 300}))


def test_a_tokenizer_file_is_used_and_a_broken_one_refused(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    config = parse_config({**CONFIG, "vocab_size": 3, "eos_token_id": 2})
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"one": 0, "two": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "tokenizer.json"))
    codec = codec_of(tmp_path, config)
    assert codec.encode(b"two one six") == [1, 0, 2]
    assert codec.decode([0, 1]) == "one two"
    assert codec.stop_tokens == {2}
    with pytest.raises(SpecAttnError, match="not UTF-8"):
        codec.encode(b"\xff")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not JSON"):
        codec_of(tmp_path, config)
