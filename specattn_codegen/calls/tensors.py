"""What every call asks of a tensor: shape, dtype, device and a unit last stride."""

from __future__ import annotations

import torch

from specattn_codegen.errors import SpecError
from specattn_codegen.spec import require_type

Shape = tuple[int | None, ...]
SLOT_DTYPES = (torch.int32, torch.int64)


def require(tensor: torch.Tensor, name: str, shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
    """Raises SpecError unless a tensor is what a kernel reads; None in `shape` is any size."""
    require_type(name, tensor, torch.Tensor, "a torch.Tensor")
    fits = tensor.dim() == len(shape) and all(
        want is None or want == have for want, have in zip(shape, tensor.shape, strict=True)
    )
    if not fits:
        want = ", ".join("any" if size is None else str(size) for size in shape)
        raise SpecError(f"{name} has shape {tuple(tensor.shape)}: must be [{want}]")
    if tensor.dtype != dtype:
        raise SpecError(f"{name} is {tensor.dtype}: must be {dtype}; convert it with .to({dtype})")
    if tensor.device != device:
        raise SpecError(f"{name} is on {tensor.device}: must be on {device} like q; move it with .to({str(device)!r})")
    if tensor.dim() and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise SpecError(f"{name} has last stride {tensor.stride(-1)}: must be 1; call .contiguous()")


def require_slots(slots: torch.Tensor, name: str, indices: torch.Tensor) -> None:
    if slots.dtype not in SLOT_DTYPES:
        raise SpecError(f"{name} is {slots.dtype}: must be torch.int32 or torch.int64")
    require(slots, name, tuple(indices.shape), slots.dtype, indices.device)


def require_contiguous(**outputs: torch.Tensor | None) -> None:
    for name, output in outputs.items():
        if output is not None and not output.is_contiguous():
            raise SpecError(f"out.{name} has strides {output.stride()}: must be contiguous")
