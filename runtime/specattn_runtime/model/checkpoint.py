"""Reads a Hugging Face checkpoint folder (config.json and safetensors files) into a Llama. Checks everything first."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from specattn_codegen.errors import CheckpointError, SpecError
from specattn_runtime.model.linear import Linear, PackedLinear, linear
from specattn_runtime.model.llama import Layer, Llama
from specattn_runtime.model.llama_config import LlamaConfig, read_config

Shapes = dict[str, tuple[int, ...]]
Tensors = dict[str, torch.Tensor]
FLOAT_FORMATS = ("F16", "BF16", "F32", "F64")


def load_llama(folder: Path | str, *, dtype: torch.dtype, device: torch.device | str = "cpu") -> Llama:
    """The checkpoint of `folder` with its weights in `dtype`. Raises CheckpointError, naming the file."""
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder; give the folder of a Hugging Face checkpoint")
    config = read_config(folder)
    return build_llama(config, _read_tensors(folder, expected_shapes(config), dtype, torch.device(device)))


def expected_shapes(config: LlamaConfig) -> Shapes:
    """Every tensor a checkpoint of this config holds, by Hugging Face's names."""
    hidden, inner, heads = config.hidden_size, config.intermediate_size, config.heads
    q_size, kv_size = heads.num_q_heads * heads.head_dim, heads.num_kv_heads * heads.head_dim
    shapes: Shapes = {"model.embed_tokens.weight": (config.vocab_size, hidden), "model.norm.weight": (hidden,)}
    if not config.tied_head:
        shapes["lm_head.weight"] = (config.vocab_size, hidden)
    for index in range(config.num_layers):
        layer = f"model.layers.{index}"
        shapes |= {f"{layer}.input_layernorm.weight": (hidden,), f"{layer}.post_attention_layernorm.weight": (hidden,)}
        shapes |= _linear(f"{layer}.self_attn.q_proj", q_size, hidden, config.attention_bias)
        shapes |= _linear(f"{layer}.self_attn.k_proj", kv_size, hidden, config.attention_bias)
        shapes |= _linear(f"{layer}.self_attn.v_proj", kv_size, hidden, config.attention_bias)
        shapes |= _linear(f"{layer}.self_attn.o_proj", hidden, q_size, config.attention_bias)
        shapes |= _linear(f"{layer}.mlp.gate_proj", inner, hidden, config.mlp_bias)
        shapes |= _linear(f"{layer}.mlp.up_proj", inner, hidden, config.mlp_bias)
        shapes |= _linear(f"{layer}.mlp.down_proj", hidden, inner, config.mlp_bias)
    return shapes


def _linear(name: str, rows: int, columns: int, bias: bool) -> Shapes:
    weight: Shapes = {f"{name}.weight": (rows, columns)}
    return weight | {f"{name}.bias": (rows,)} if bias else weight


def build_llama(config: LlamaConfig, tensors: Tensors, *, packed: bool = True) -> Llama:
    """A Llama from tensors named and shaped as `expected_shapes` says, all of one dtype on one device. packed: where
    torch can; weights that are to be trained must not be."""
    _require_alike(tensors)

    def product(layer: int, *names: str) -> Linear | PackedLinear:
        """Several projections of the same input, stacked into one."""
        parts = [f"model.layers.{layer}.{name}" for name in names]
        biases = [tensors[f"{part}.bias"] for part in parts if f"{part}.bias" in tensors]
        weight = torch.cat([tensors[f"{part}.weight"] for part in parts])
        bias = torch.cat(biases) if biases else None
        return linear(weight, bias) if packed else Linear(weight=weight, bias=bias)

    layers = tuple(
        Layer(
            attention_norm=tensors[f"model.layers.{index}.input_layernorm.weight"],
            qkv=product(index, "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            output=product(index, "self_attn.o_proj"),
            mlp_norm=tensors[f"model.layers.{index}.post_attention_layernorm.weight"],
            gate_up=product(index, "mlp.gate_proj", "mlp.up_proj"),
            down=product(index, "mlp.down_proj"),
        )
        for index in range(config.num_layers)
    )
    embedding = tensors["model.embed_tokens.weight"]
    cos, signed_sin = config.rope.tables(config.heads.head_dim, config.max_positions, embedding.dtype)
    return Llama(
        config=config,
        embedding=embedding,
        layers=layers,
        norm=tensors["model.norm.weight"],
        head=embedding if config.tied_head else tensors["lm_head.weight"],
        cos=cos.to(embedding.device),
        signed_sin=signed_sin.to(embedding.device),
    )


def _require_alike(tensors: Tensors) -> None:
    first = tensors["model.embed_tokens.weight"]
    for name, tensor in tensors.items():
        if (tensor.dtype, tensor.device) != (first.dtype, first.device):
            raise SpecError(
                f"{name} is {tensor.dtype} on {tensor.device}: a model has one dtype and one device, and "
                f"model.embed_tokens.weight is {first.dtype} on {first.device}; convert it with .to()"
            )


def _read_tensors(folder: Path, expected: Shapes, dtype: torch.dtype, device: torch.device) -> Tensors:
    tensors: Tensors = {}
    for path in _weight_files(folder):
        tensors |= _read_file(path, expected, dtype, device)
    missing = [name for name in expected if name not in tensors]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(f"{folder}: tensor {missing[0]}{more} is missing; the checkpoint is incomplete")
    return tensors


def _read_file(path: Path, expected: Shapes, dtype: torch.dtype, device: torch.device) -> Tensors:
    tensors: Tensors = {}
    try:
        with safe_open(path, framework="pt", device="cpu") as weights:
            for name in weights.keys():  # noqa: SIM118 - not a mapping
                if _is_wanted(path, name, expected):
                    part = weights.get_slice(name)
                    _require_shape(path, name, tuple(part.get_shape()), part.get_dtype(), expected[name])
                    tensors[name] = weights.get_tensor(name).to(device=device, dtype=dtype)
    except SafetensorError as error:
        raise CheckpointError(f"{path}: corrupt or truncated ({error}); download it again") from error
    return tensors


def _is_wanted(path: Path, name: str, expected: Shapes) -> bool:
    """False for tensors that carry nothing; a tensor that would change the arithmetic is refused, not ignored."""
    if name in expected:
        return True
    if name.endswith("rotary_emb.inv_freq") or name == "lm_head.weight":  # derived from the config; a tied copy
        return False
    raise CheckpointError(f"{path}: tensor {name} is no part of the Llama that config.json describes")


def _require_shape(path: Path, name: str, shape: tuple[int, ...], file_format: str, expected: tuple[int, ...]) -> None:
    if shape != expected:
        raise CheckpointError(f"{path}: tensor {name} is {list(shape)}; config.json asks for {list(expected)}")
    if file_format not in FLOAT_FORMATS:
        raise CheckpointError(f"{path}: tensor {name} is {file_format}; supported: {', '.join(FLOAT_FORMATS)}")


def _weight_files(folder: Path) -> list[Path]:
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise CheckpointError(f"{folder}: no model.safetensors or model.safetensors.index.json; save it as safetensors")
    try:
        names = _shard_names(json.loads(index.read_text(encoding="utf-8")))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{index}: not JSON ({error}); download it again") from error
    if names is None:
        raise CheckpointError(f"{index}: weight_map must name, for each tensor, a file of this folder")
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        raise CheckpointError(f"{folder / absent[0]}: missing, {len(absent)} of {len(names)} files are; download them")
    return [folder / name for name in names]


def _shard_names(fields: object) -> list[str] | None:
    """The files of an index, each a plain name; None where it is not an index."""
    weight_map = fields.get("weight_map") if isinstance(fields, dict) else None
    files: Iterable[object] = weight_map.values() if isinstance(weight_map, dict) else ()
    names = sorted({name for name in files if isinstance(name, str) and Path(name).name == name})
    return names if weight_map and len(names) == len(set(files)) else None
