"""What a processor's tensor memory accelerator asks of a cache that is described to it."""

from __future__ import annotations

import torch

from specattn_codegen.errors import SpecError
from specattn_codegen.space.triton import DESCRIPTOR_ALIGNMENT


def require_aligned(cache: torch.Tensor, name: str) -> None:
    """Tensor descriptors take no other address or stride. Raises SpecError."""
    strides = [stride * cache.element_size() for stride in cache.stride()[:-1]]
    if cache.data_ptr() % DESCRIPTOR_ALIGNMENT or any(stride % DESCRIPTOR_ALIGNMENT for stride in strides):
        raise SpecError(
            f"{name} starts at {cache.data_ptr():#x} with strides of {strides} bytes: kv_load=descriptor needs "
            f"multiples of {DESCRIPTOR_ALIGNMENT} bytes; align the cache, or use a plan with kv_load=pointer"
        )
