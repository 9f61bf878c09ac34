"""Log-sum-exps that stand in for a verification's own, so that one pass can normalise its scores as it goes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch


def row_references(steps: Sequence[torch.Tensor], floor: torch.Tensor) -> torch.Tensor:
    """The lse of each draft step [layers, B, Hq], NaN where it did not run a request -> [layers, B, steps + 1, Hq].

    Row i of a verification is the token that draft step i ran. No step ran a request's last draft, nor the padding
    after it: those rows take the highest lse of its steps. None is below the floor [layers, B, Hq], which a request
    that no step ran takes as it is. Both because a reference too high only makes its row count less, while one too
    low, of a row whose keys the draft did not read, drowns all others.
    """
    rows = torch.stack([*steps, torch.full_like(floor, math.nan)], dim=2)
    highest = rows.nan_to_num(nan=-math.inf).amax(dim=2, keepdim=True)
    return torch.where(rows.isnan(), highest, rows).maximum(floor[:, :, None])
