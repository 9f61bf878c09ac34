"""What every request's text is, as far as its rows have been run. Knows tokens, not models."""

from __future__ import annotations

import torch

from specattn_codegen.errors import SpecError


class Texts:
    """Padding, prompt and what follows, a request a row; rows past the prompt are provisional until run again."""

    def __init__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, capacity: int) -> None:
        """input_ids [B, N], padded on the left where attention_mask [B, N] is 0; capacity: tokens with the padding.

        Raises SpecError where the mask has holes.
        """
        width = input_ids.shape[1]
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if mask.shape != input_ids.shape:
            raise SpecError(
                f"attention_mask of shape {tuple(mask.shape)} for prompts of shape {tuple(input_ids.shape)}: they must "
                "be the same; continue from a whole prompt, not from a cache"
            )
        self.padding = (mask == 0).sum(dim=1).tolist()
        for request, padding in enumerate(self.padding):
            if mask[request, :padding].any() or padding == width:
                found = "all 0" if padding == width else f"0 at {_hole(mask[request])} after a 1"
                raise SpecError(
                    f"prompt {request}: its attention_mask is {found}: it must be zeros, then one 1 or more and "
                    "nothing else; pad on the left (tokenizer.padding_side='left')"
                )
        self._offsets = torch.tensor(self.padding, device=input_ids.device)
        self._tokens = torch.nn.functional.pad(input_ids, (0, capacity - width))
        self.width = width

    @property
    def device(self) -> torch.device:
        return self._tokens.device

    def padded_prompt(self, request: int) -> list[int]:
        return self._tokens[request, : self.width].tolist()

    def prompt(self, request: int) -> list[int]:
        """Without the padding."""
        return self._tokens[request, self.padding[request] : self.width].tolist()

    def write(self, requests: torch.Tensor, positions: torch.Tensor, tokens: torch.Tensor) -> None:
        """tokens [N] at positions [N], counted without padding, of requests [N]."""
        self._tokens[requests, self._offsets[requests] + positions] = tokens

    def upto(self, request: int, position: int) -> torch.Tensor:
        """Everything up to and with a position, padding included, as logits processors want it [n]."""
        return self._tokens[request, : self.padding[request] + position + 1]


def _hole(mask: torch.Tensor) -> int:
    """The first 0 of a mask [N] that follows a 1."""
    return int(((mask != 0).cummax(0).values & (mask == 0)).int().argmax())
