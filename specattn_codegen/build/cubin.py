"""Launches a function of an NVIDIA binary through the CUDA driver alone, without what compiled it."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from specattn_codegen.errors import BuildError

MAX_DYNAMIC_SHARED_SIZE_BYTES = 8  # CUfunction_attribute of cuda.h
SCALARS: Mapping[str, type[Any]] = {
    "int": ctypes.c_int32,
    "int64_t": ctypes.c_int64,
    "float": ctypes.c_float,
    "double": ctypes.c_double,
}


@functools.cache
def _driver() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise BuildError(f"no NVIDIA driver on this machine: {error}") from error


def _call(name: str, *arguments: object) -> None:
    status = getattr(_driver(), name)(*arguments)
    if status:
        text = ctypes.c_char_p()
        _driver().cuGetErrorName(status, ctypes.byref(text))
        raise BuildError(f"{name} failed: {(text.value or b'unknown error').decode()}")


@dataclass(frozen=True, slots=True, kw_only=True)
class CubinFunction:
    """One function of a loaded binary, called with a grid and its arguments by name; it takes those it has.

    parameters  (type, name) in the order of the function
    """

    handle: ctypes.c_void_p
    parameters: tuple[tuple[str, str], ...]
    threads: int
    smem_bytes: int

    def __call__(self, grid: tuple[int, ...], **arguments: Any) -> None:
        if 0 in grid:
            return
        values = [self._value(kind, arguments[name]) for kind, name in self.parameters]
        addresses = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        blocks = (*grid, *(1,) * (3 - len(grid)))
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        shape = (*blocks, self.threads, 1, 1, self.smem_bytes)
        _call("cuLaunchKernel", self.handle, *map(ctypes.c_uint, shape), stream, addresses, None)

    @staticmethod
    def _value(kind: str, argument: torch.Tensor | float) -> Any:
        if isinstance(argument, torch.Tensor):
            return ctypes.c_void_p(argument.data_ptr())
        return SCALARS[kind](argument)


def load(
    binary: bytes, symbol: str, parameters: tuple[tuple[str, str], ...], threads: int, smem_bytes: int
) -> CubinFunction:
    """A function of a binary, loaded on torch's current device for the life of the process. Raises BuildError."""
    torch.zeros(1, device="cuda")  # makes torch's context the current one
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    _call("cuModuleLoadData", ctypes.byref(module), binary)
    _call("cuModuleGetFunction", ctypes.byref(function), module, symbol.encode())
    _call("cuFuncSetAttribute", function, MAX_DYNAMIC_SHARED_SIZE_BYTES, smem_bytes)
    return CubinFunction(handle=function, parameters=parameters, threads=threads, smem_bytes=smem_bytes)
