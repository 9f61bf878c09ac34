"""transformers' attention interface, through which a model's own layers hand their rows to a phase of decoding."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from specattn_codegen.errors import SpecError
from specattn_runtime.model.llama import Attention

NAME = "specattn"


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    _attention_mask: torch.Tensor | None,
    *,
    specattn: Attention | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """query [1, Hq, N, D], key and value [1, Hkv, N, D] of N rows of any requests -> [1, N, Hq, D] and no weights.

    specattn is the phase that attends, a keyword of the model's forward. Scale, window, softcap and sinks are its
    kernels', which were made for the layer.
    """
    if specattn is None:
        raise SpecError(
            f"attn_implementation={NAME!r}: works inside generate(custom_generate=speculative(...)) only; "
            "load the model with another, such as sdpa"
        )
    q, k, v = (rows[0].transpose(0, 1) for rows in (query, key, value))
    layer = module.layer_idx
    assert isinstance(layer, int)
    return specattn(layer, q, k, v)[None], None


def no_mask(*_: object, **__: object) -> None:
    """Rows know their positions, so that nobody needs a mask."""


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, no_mask)


@contextmanager
def own_attention(model: PreTrainedModel) -> Iterator[None]:
    """The model attends through `attend` inside, and as it did before afterwards."""
    before = model.config._attn_implementation
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before or "eager")
