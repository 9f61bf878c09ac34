"""Rotary position embeddings as Llama checkpoints define them. Knows angles, not attention."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from specattn_codegen.errors import SpecError

RopeKind = Literal["default", "linear", "llama3"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope:
    """Frequencies of the rotation.

    theta                   base of the wavelengths
    kind                    default; linear (positions divided by factor); llama3 (only long wavelengths divided)
    factor                  how much further than trained the positions reach
    low_freq_factor         llama3: wavelengths above original_max_positions / low_freq_factor are divided by factor
    high_freq_factor        llama3: wavelengths below original_max_positions / high_freq_factor stay
    original_max_positions  llama3: positions the model was trained on before it was stretched
    """

    theta: float
    kind: RopeKind = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192

    def __post_init__(self) -> None:
        if self.kind not in get_args(RopeKind):
            raise SpecError(f"rope_type={self.kind!r}: not supported; supported: {', '.join(get_args(RopeKind))}")
        if not (math.isfinite(self.theta) and self.theta > 0):
            raise SpecError(f"rope_theta={self.theta!r}: must be positive and finite")
        if not (math.isfinite(self.factor) and self.factor >= 1):
            raise SpecError(f"rope factor={self.factor!r}: must be at least 1")
        if not 0 < self.low_freq_factor < self.high_freq_factor:
            raise SpecError(
                f"low_freq_factor={self.low_freq_factor}, high_freq_factor={self.high_freq_factor}: "
                "the low one must be positive and the smaller"
            )
        if self.original_max_positions < 1:
            raise SpecError(f"original_max_position_embeddings={self.original_max_positions}: must be at least 1")

    def frequencies(self, head_dim: int) -> torch.Tensor:
        """Radians a position, [head_dim / 2] float32."""
        plain = 1.0 / self.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
        if self.kind == "default":
            return plain
        if self.kind == "linear":
            return plain / self.factor
        turns = self.original_max_positions * plain / (2 * math.pi)  # full turns within the trained positions
        kept = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        kept = kept.clamp(0.0, 1.0)  # 0: divided by factor, 1: unchanged, linear between
        return kept * plain + (1.0 - kept) * plain / self.factor

    def tables(self, head_dim: int, positions: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """(cos, signed sin), each [positions, head_dim], ready for `rotate`.

        Angles are computed in float32 whatever the dtype, because that is the arithmetic checkpoints were trained with:
        at position 4,000 a float64 angle already differs by 1e-4.
        """
        angles = torch.arange(positions, dtype=torch.float32)[:, None] * self.frequencies(head_dim)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([cos, cos], dim=1).to(dtype), torch.cat([-sin, sin], dim=1).to(dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, signed_sin: torch.Tensor) -> torch.Tensor:
    """Rotates x [N, H, D] by the angles of its rows, cos and signed_sin [N, 1, D]; dimension i pairs with i + D / 2."""
    return x * cos + x.roll(x.shape[-1] // 2, dims=-1) * signed_sin
