"""ModelHeads: what a model's configuration fixes about its attention. Knows neither files nor kernels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypedDict


class _Geometry(TypedDict):
    num_q_heads: int
    num_kv_heads: int
    head_dim: int


class HeadFields(_Geometry, total=False):
    """Keyword fields of a HeadConfig; what is left out has the HeadConfig's default."""

    v_head_dim: int
    scale: float
    softcap: float | None
    window: int | None
    sinks: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelHeads:
    """The attention heads of one model.

    name                     registry name, or the path it was read from
    layer_kinds              layer kind (transformers' own word for it) -> keyword fields of its HeadConfig
    source                   where the numbers were read
    num_layers               attention layers of all kinds together
    max_position_embeddings  longest context in tokens; None where the configuration does not say
    """

    name: str
    layer_kinds: Mapping[str, HeadFields]
    source: str
    num_layers: int
    max_position_embeddings: int | None = None
