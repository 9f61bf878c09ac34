"""The kernels of a transformers model's layers, each with its own window, scale, softcap and sinks."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from specattn_codegen.errors import SpecError
from specattn_codegen.heads import HeadConfig
from specattn_codegen.models.model_config import parse_config
from specattn_codegen.results import Selection, SparseOutput, VerifyOutput
from specattn_runtime.dispatch import Kernels, load_kernels
from specattn_runtime.kernels_protocol import AttentionKernels

# Whose layers attend through the attention interface, all of them alike but for the fields of a HeadConfig, and whose
# logits are the output embedding's, capped where the configuration says so.
SERVED = ("gemma2", "gemma3_text", "gpt_oss", "llama", "mistral", "qwen2", "qwen3", "qwen3_moe")


@dataclass(frozen=True, slots=True)
class SinkKernels:
    """A layer's kernels with its learned sinks [Hq]."""

    kernels: Kernels
    sinks: torch.Tensor

    @property
    def heads(self) -> HeadConfig:
        return self.kernels.heads

    def verify_attention(self, *rows: Any, **options: Any) -> VerifyOutput:
        return self.kernels.verify_attention(*rows, **options, sinks=self.sinks)

    def select_kv(self, *scores: Any, **options: Any) -> Selection:
        return self.kernels.select_kv(*scores, **options)

    def sparse_attention(self, *rows: Any, **options: Any) -> SparseOutput:
        return self.kernels.sparse_attention(*rows, **options, sinks=self.sinks)


def layer_kernels(model: PreTrainedModel, page_size: int) -> tuple[tuple[HeadConfig, ...], list[AttentionKernels]]:
    """Every layer's heads and kernels. Raises SpecError for a model that cannot be served, saying why."""
    model_type = model.config.model_type
    if model_type not in SERVED:
        raise SpecError(f"model_type={model_type!r}: not served; served are {', '.join(SERVED)}")
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) > 1:
        raise SpecError(
            f"model on {', '.join(sorted(map(str, devices)))}: must be on one device; load it without device_map"
        )
    modules = [layer.self_attn for layer in model.get_decoder().layers]  # pyright: ignore[reportGeneralTypeIssues]
    for index, module in enumerate(modules):
        _require_dtype(module, f"layer {index}", model.dtype)
    heads = _heads_by_layer(model, len(modules))
    kernels: list[AttentionKernels] = []
    for index, (module, each) in enumerate(zip(modules, heads, strict=True)):
        if not math.isclose(module.scaling, each.scale, rel_tol=1e-6):
            raise SpecError(
                f"layer {index} scales by {module.scaling}, its configuration says {each.scale}: not served"
            )
        loaded = _loaded(each, devices.copy().pop(), model.dtype, page_size)
        kernels.append(SinkKernels(loaded, module.sinks.float()) if each.sinks else loaded)
    return heads, kernels


def _require_dtype(module: torch.nn.Module, place: str, dtype: torch.dtype) -> None:
    """Raises SpecError where the projections of an attention differ in dtype; norms may have one of their own."""
    for name, parameter in module.named_parameters():
        if parameter.dim() > 1 and parameter.dtype != dtype:
            raise SpecError(
                f"{place}: {name} is {parameter.dtype} in a model of {dtype}; queries, keys and the KV cache share a "
                f"dtype: convert it with model.to({dtype})"
            )


def _heads_by_layer(model: PreTrainedModel, num_layers: int) -> tuple[HeadConfig, ...]:
    parsed = parse_config(model.config.to_dict(), name=type(model).__name__)
    kinds = {kind: HeadConfig(**fields) for kind, fields in parsed.layer_kinds.items()}
    if len({(each.num_kv_heads, each.head_dim, each.v_head_dim) for each in kinds.values()}) > 1:
        raise SpecError(f"{type(model).__name__}: its layers' keys differ in shape, and one KV cache holds one shape")
    names = list(kinds) * num_layers if len(kinds) == 1 else model.config.layer_types
    return tuple(kinds[name] for name in names[:num_layers])


@functools.lru_cache(maxsize=64)
def _loaded(heads: HeadConfig, device: torch.device, dtype: torch.dtype, page_size: int) -> Kernels:
    """One set for all layers, and all calls of generate, that share a head configuration."""
    return load_kernels(heads, device=device, dtype=dtype, page_size=page_size)
