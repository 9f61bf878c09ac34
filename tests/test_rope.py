"""Rotary frequencies against their definitions, and the rotation against complex numbers."""

from __future__ import annotations

import math

import pytest
import torch

from specattn_codegen import SpecError
from specattn_runtime.model.rope import Rope, rotate

TOLERANCE = 4e-7  # a few float32 roundings


def test_default_and_linear_frequencies() -> None:
    expected = [10_000.0 ** (-i / 8) for i in range(0, 8, 2)]
    assert Rope(theta=10_000.0).frequencies(8).tolist() == pytest.approx(expected, rel=TOLERANCE)
    stretched = Rope(theta=10_000.0, kind="linear", factor=4.0).frequencies(8).tolist()
    assert stretched == pytest.approx([frequency / 4 for frequency in expected], rel=TOLERANCE)


def test_llama3_keeps_short_wavelengths_divides_long_ones_and_blends_between() -> None:
    rope = Rope(
        theta=500_000.0,
        kind="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_positions=8192,
    )
    kept = divided = blended = 0
    for i, actual in zip(range(0, 128, 2), rope.frequencies(128).tolist(), strict=True):
        plain = 500_000.0 ** (-i / 128)
        wavelength = 2 * math.pi / plain
        if wavelength < 8192 / 4:
            kept += 1
            expected = plain
        elif wavelength > 8192:
            divided += 1
            expected = plain / 8
        else:
            blended += 1
            smooth = (8192 / wavelength - 1) / 3
            expected = (1 - smooth) * plain / 8 + smooth * plain
        assert actual == pytest.approx(expected, rel=4 * TOLERANCE)
    assert min(kept, divided, blended) > 0


def test_rotation_multiplies_complex_pairs() -> None:
    rope = Rope(theta=100.0)
    x = torch.randn(5, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    cos, signed_sin = rope.tables(8, 5, torch.float64)
    turned = rotate(x, cos[:, None], signed_sin[:, None])
    angles = torch.arange(5, dtype=torch.float32)[:, None] * rope.frequencies(8)
    unit = torch.polar(torch.ones_like(angles), angles).to(torch.complex128)[:, None]
    expected = torch.complex(x[..., :4], x[..., 4:]) * unit
    # cos and sin are float32 numbers, computed by two different routines.
    assert torch.allclose(turned, torch.cat([expected.real, expected.imag], dim=-1), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"theta": 0.0}, "rope_theta=0.0"),
        ({"theta": 1e4, "kind": "yarn"}, "rope_type='yarn': not supported; supported: default, linear, llama3"),
        ({"theta": 1e4, "kind": "linear", "factor": 0.5}, "factor=0.5"),
        ({"theta": 1e4, "kind": "llama3", "factor": 2.0, "low_freq_factor": 4.0}, "low_freq_factor=4.0"),
        ({"theta": 1e4, "original_max_positions": 0}, "original_max_position_embeddings=0"),
    ],
)
def test_bad_ropes(changes: dict[str, object], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        Rope(**changes)  # pyright: ignore[reportArgumentType]
