"""A Llama in plain torch. Attention itself is the caller's: each phase of decoding passes its own function."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn import functional

from specattn_codegen.heads import HeadConfig
from specattn_runtime.model.linear import Linear, PackedLinear
from specattn_runtime.model.llama_config import LlamaConfig
from specattn_runtime.model.rope import rotate


class Attention(Protocol):
    """One layer's attention: rows q [N, Hq, D] with their own keys and values k, v [N, Hkv, D] -> [N, Hq, D]."""

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One layer's weights; q, k and v are one matrix, gate and up another, so that each is one product."""

    attention_norm: torch.Tensor
    qkv: Linear | PackedLinear
    output: Linear | PackedLinear
    mlp_norm: torch.Tensor
    gate_up: Linear | PackedLinear
    down: Linear | PackedLinear


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama:
    """embedding and head [vocab, hidden]; cos and signed_sin [max_positions, head_dim] as `rotate` takes them."""

    config: LlamaConfig
    embedding: torch.Tensor
    layers: tuple[Layer, ...]
    norm: torch.Tensor
    head: torch.Tensor
    cos: torch.Tensor
    signed_sin: torch.Tensor

    @property
    def heads(self) -> HeadConfig:
        return self.config.heads

    @property
    def num_layers(self) -> int:
        return self.config.num_layers

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def max_positions(self) -> int:
        return self.config.max_positions

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    def forward(self, tokens: torch.Tensor, positions: torch.Tensor, attention: Attention) -> torch.Tensor:
        """tokens, positions [N] int64, of any mix of requests -> hidden states [N, hidden]."""
        hidden = self.embedding[tokens]
        cos, signed_sin = self.cos[positions][:, None], self.signed_sin[positions][:, None]
        for index, layer in enumerate(self.layers):
            q, k, v = self._qkv(layer, hidden, cos, signed_sin)
            hidden = hidden + layer.output(attention(index, q, k, v).flatten(1))
            gate, up = layer.gate_up(self._normed(hidden, layer.mlp_norm)).chunk(2, dim=1)
            hidden = hidden + layer.down(functional.silu(gate) * up)
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [N, hidden] -> next-token logits [N, vocab]."""
        return functional.linear(self._normed(hidden, self.norm), self.head)

    def _qkv(
        self, layer: Layer, hidden: torch.Tensor, cos: torch.Tensor, signed_sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        heads = self.config.heads
        qkv = layer.qkv(self._normed(hidden, layer.attention_norm)).view(len(hidden), -1, heads.head_dim)
        rotated = rotate(qkv[:, : heads.num_q_heads + heads.num_kv_heads], cos, signed_sin)
        q, k = rotated.split([heads.num_q_heads, heads.num_kv_heads], dim=1)
        return q.contiguous(), k, qkv[:, heads.num_q_heads + heads.num_kv_heads :]

    def _normed(self, hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return functional.rms_norm(hidden, weight.shape, weight, self.config.norm_eps)
