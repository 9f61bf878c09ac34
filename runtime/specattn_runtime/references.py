"""Log-sum-exps that stand in for a verification's own, so that one pass can normalise its scores as it goes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch


def row_references(steps: Sequence[torch.Tensor], fallback: torch.Tensor) -> torch.Tensor:
    """The lse of each draft step [layers, B, Hq], NaN where it did not run a request -> [layers, B, steps + 1, Hq].

    Row i of a verification is the token that draft step i ran. No step ran a request's last draft, nor the padding
    after it: those rows take the highest lse of its steps, because one too high only makes a row count less, while
    one too low makes it drown the others. A request that no step ran takes the fallback, [layers, B, Hq].
    """
    rows = torch.stack([*steps, torch.full_like(fallback, math.nan)], dim=2)
    highest = rows.nan_to_num(nan=-math.inf, neginf=-math.inf).amax(dim=2)
    highest = torch.where(highest == -math.inf, fallback, highest)
    return torch.where(rows.isnan(), highest[:, :, None], rows)
