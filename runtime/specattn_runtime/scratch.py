"""Memory that kernels write partial results to: the caller's, or one piece that grows and is kept."""

from __future__ import annotations

import torch

from specattn_codegen.errors import SpecError


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
        fresh = torch.empty(needed, dtype=torch.uint8, device=self._device)
        if self._keep:
            self._kept = fresh
        return fresh
