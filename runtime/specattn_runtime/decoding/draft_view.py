"""What drafts read, from one refresh to the next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from specattn_codegen.results import Selection
from specattn_runtime.decoding.key_choice import padded


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftView:
    """One selection a layer, of keys below tail_start [B] int32, and every key from there on.

    selections  empty where each draft step selects for itself
    least_lse   [layers, B, Hq], of each request's verified rows; None where the preset uses no references
    """

    selections: tuple[Selection, ...]
    tail_start: torch.Tensor
    least_lse: torch.Tensor | None = None

    @property
    def selected_share(self) -> float:
        """Selected keys over prefix keys, mean over layers, heads and requests that have any."""
        prefixes = self.tail_start.float()
        if not self.selections or not prefixes.any():
            return 0.0
        selected = torch.stack([selection.counts.float().mean(dim=1) for selection in self.selections]).mean(dim=0)
        return (self.selections[0].block * selected.sum() / prefixes.sum()).clamp_max(1.0).item()


def merge_views(old: DraftView, new: DraftView, due: Sequence[bool]) -> DraftView:
    """`new` for the requests that were due for it, `old` for the others, whose dense tail goes on growing."""
    chosen = torch.tensor(due, device=new.tail_start.device)
    selections = [_merge(before, after, chosen) for before, after in zip(old.selections, new.selections, strict=True)]
    return DraftView(
        selections=tuple(selections),
        tail_start=torch.where(chosen, new.tail_start, old.tail_start),
        least_lse=new.least_lse,
    )


def _merge(old: Selection, new: Selection, chosen: torch.Tensor) -> Selection:
    before, after = padded([old.indices, new.indices])
    indices = torch.where(chosen[:, None, None], after, before)
    return Selection(indices, torch.where(chosen[:, None], new.counts, old.counts), new.block)
