"""HeadConfig: what a model fixes about one kind of attention layer. Models with the same HeadConfig share kernels."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from specattn_codegen import models
from specattn_codegen.errors import SpecError


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadConfig:
    """Attention-head geometry of one layer kind.

    num_q_heads   query heads (Hq), a multiple of num_kv_heads
    num_kv_heads  KV heads (Hkv); each serves a group of Hq / Hkv query heads
    head_dim      dimension of q and k
    v_head_dim    dimension of v and out; head_dim when not given
    scale         multiplies q . k; 1 / sqrt(head_dim) when not given
    softcap       logits become softcap * tanh(logit / softcap); None for none
    window        keys a row sees, itself included; None for all
    sinks         whether each query head has a learned logit that takes part in the softmax and carries no value
    """

    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int = 0
    scale: float = 0.0
    softcap: float | None = None
    window: int | None = None
    sinks: bool = False

    def __post_init__(self) -> None:
        if not self.v_head_dim:
            object.__setattr__(self, "v_head_dim", self.head_dim)
        for name in ("num_q_heads", "num_kv_heads", "head_dim", "v_head_dim"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise SpecError(f"{name}={value!r}: must be a whole number of at least 1")
        if not self.scale:
            object.__setattr__(self, "scale", 1.0 / math.sqrt(self.head_dim))
        if self.num_q_heads % self.num_kv_heads:
            raise SpecError(
                f"num_q_heads={self.num_q_heads}, num_kv_heads={self.num_kv_heads}: query heads must be a multiple "
                f"of KV heads; give for example num_q_heads={self._nearest_multiple()}"
            )
        if not (math.isfinite(self.scale) and self.scale > 0):
            raise SpecError(f"scale={self.scale!r}: must be positive and finite; leave it out for 1/sqrt(head_dim)")
        if self.softcap is not None and not (math.isfinite(self.softcap) and self.softcap > 0):
            raise SpecError(f"softcap={self.softcap!r}: must be positive and finite; use None for no softcap")
        if self.window is not None and self.window < 1:
            raise SpecError(f"window={self.window!r}: must be at least 1 key; use None for no window")

    def _nearest_multiple(self) -> int:
        return max(1, round(self.num_q_heads / self.num_kv_heads)) * self.num_kv_heads

    @property
    def group(self) -> int:
        """Query heads that share one KV head."""
        return self.num_q_heads // self.num_kv_heads

    @property
    def name(self) -> str:
        """File-system friendly and unique, as in `q32-kv8-d128` or `q64-kv8-d64-w128-sinks`."""
        parts = [f"q{self.num_q_heads}", f"kv{self.num_kv_heads}", f"d{self.head_dim}"]
        if self.v_head_dim != self.head_dim:
            parts.append(f"dv{self.v_head_dim}")
        if not math.isclose(self.scale, 1.0 / math.sqrt(self.head_dim), rel_tol=1e-9):
            parts.append(f"scale{self.scale:.6g}")
        if self.softcap is not None:
            parts.append(f"cap{self.softcap:g}")
        if self.window is not None:
            parts.append(f"w{self.window}")
        if self.sinks:
            parts.append("sinks")
        return "-".join(parts)

    def shard(self, tp: int) -> HeadConfig:
        """The heads of one of `tp` tensor-parallel ranks; KV heads are replicated when there are fewer than ranks."""
        if tp < 1:
            raise SpecError(f"tp={tp}: must be at least 1")
        if self.num_q_heads % tp:
            raise SpecError(f"tp={tp}: must divide the {self.num_q_heads} query heads; {self._tp_choices()}")
        if self.num_kv_heads % tp and tp % self.num_kv_heads:
            raise SpecError(
                f"tp={tp}: must divide the {self.num_kv_heads} KV heads or be a multiple of them; {self._tp_choices()}"
            )
        return dataclasses.replace(
            self, num_q_heads=self.num_q_heads // tp, num_kv_heads=max(1, self.num_kv_heads // tp)
        )

    def _tp_choices(self) -> str:
        fits = [
            tp
            for tp in range(1, self.num_q_heads + 1)
            if self.num_q_heads % tp == 0 and (self.num_kv_heads % tp == 0 or tp % self.num_kv_heads == 0)
        ]
        return f"use one of {', '.join(map(str, fits))}"

    @classmethod
    def from_model(cls, model: str, *, tp: int = 1, layer_kind: str | None = None) -> HeadConfig:
        """Heads of a registered model name, a Hugging Face config.json, or a checkpoint folder.

        A model whose layers differ needs `layer_kind`; without one its first full-attention kind is meant.
        """
        kinds = layer_heads(model)
        if layer_kind is None:
            layer_kind = next((kind for kind, heads in kinds.items() if heads.window is None), next(iter(kinds)))
        if layer_kind not in kinds:
            raise SpecError(f"layer_kind={layer_kind!r}: {model} has {', '.join(kinds)}")
        return kinds[layer_kind].shard(tp)


def layer_heads(model: str) -> dict[str, HeadConfig]:
    """Every layer kind of a model, as in `{"full_attention": ..., "sliding_attention": ...}`."""
    return {kind: HeadConfig(**fields) for kind, fields in models.resolve(model).layer_kinds.items()}
