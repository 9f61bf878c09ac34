"""Memory that kernels write partial results to: the caller's, or one piece that grows and is kept."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from specattn_codegen.errors import SpecError
from specattn_codegen.processors import huge_pages

HEADROOM = 4  # memory that is kept grows by one part in so many more than is needed: texts grow at every round
LINE = 16  # scores of a cache line


class Scratch:
    """Of one device. keep=False allocates anew for every call, for several threads or streams."""

    def __init__(self, device: torch.device, *, keep: bool) -> None:
        self._device = device
        self._keep = keep
        self._kept = torch.empty(0, dtype=torch.uint8, device=device)

    def lend(self, needed: int, given: torch.Tensor | None) -> torch.Tensor:
        """At least `needed` bytes: the caller's tensor where there is one. Raises SpecError where that is too small."""
        if given is not None:
            if given.dtype != torch.uint8 or given.numel() < needed or not given.is_contiguous():
                raise SpecError(
                    f"workspace of {given.numel()} {given.dtype}: needs {needed} contiguous torch.uint8 bytes"
                )
            return given
        if self._kept.numel() >= needed:
            return self._kept
        if not self._keep:
            return torch.empty(needed, dtype=torch.uint8, device=self._device)
        self._kept = _with_headroom(needed, torch.uint8, self._device)
        return self._kept


class KeptScores:
    """Memory for scores, where fresh pages at every round would take longer than to write the scores."""

    def __init__(self) -> None:
        self._kept = torch.empty(0)

    def lend(self, shape: Sequence[int], device: torch.device) -> torch.Tensor:
        """A float32 tensor with anything in it, in the place of the one lent before. Rows begin at cache lines, so that
        a kernel may write them past the caches."""
        *rows, columns = shape
        width = -(-columns // LINE) * LINE
        needed = math.prod(rows) * width
        if self._kept.numel() < needed or self._kept.device != device:
            self._kept = _with_headroom(needed, torch.float32, device)
        return self._kept[:needed].view(*rows, width)[..., :columns]


@torch.inference_mode(False)  # whoever is lent it next may be outside of that mode
def _with_headroom(needed: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return huge_pages.advise(torch.empty(needed + needed // HEADROOM, dtype=dtype, device=device))
