"""Products with packed weights are those with plain ones."""

from __future__ import annotations

import pytest
import torch

from specattn_runtime.model.linear import Linear, PackedLinear, linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [0, 1, 7, 112])
@pytest.mark.parametrize("shape", [(24, 16), (1, 33), (257, 40)])
def test_a_packed_product_is_the_plain_one(dtype: torch.dtype, rows: int, shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(rows)
    weight, bias, x = (
        torch.randn(*size, generator=generator).to(dtype) for size in (shape, shape[:1], (rows, shape[1]))
    )
    for given in (None, bias):
        packed = linear(weight, given)
        assert isinstance(packed, PackedLinear)
        assert torch.equal(packed.weight, weight)
        exact = torch.nn.functional.linear(x.double(), weight.double(), None if given is None else given.double())
        # Sums of `in` products in float32, rounded once to the result's dtype.
        worst = shape[1] * 2.0**-24 * x.double().abs() @ weight.double().abs().T
        found = packed(x)
        assert found.dtype == dtype
        assert bool(((found.double() - exact).abs() <= worst + exact.abs() * torch.finfo(dtype).eps + 1e-6).all())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_what_cannot_be_packed_is_plain(dtype: torch.dtype) -> None:
    assert isinstance(linear(torch.ones(3, 2, dtype=dtype)), Linear)
