"""Launches a function of an NVIDIA binary through the CUDA driver alone, without what compiled it.

Needs torch and the driver and nothing of this project, so that exported kernels carry it along as it is.
"""

from __future__ import annotations

import ctypes
import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

MANIFEST = "kernels.json"
MAX_DYNAMIC_SHARED_SIZE_BYTES = 8  # CUfunction_attribute of cuda.h
SCALARS: Mapping[str, type[Any]] = {
    "int": ctypes.c_int32,
    "int64_t": ctypes.c_int64,
    "float": ctypes.c_float,
    "double": ctypes.c_double,
}


TENSOR_MAP_BYTES, TENSOR_MAP_ALIGNMENT = 128, 64  # of a CUtensorMap


class CudaError(RuntimeError):
    """The driver is missing, or refused a call."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorMap:
    """A parameter that describes an array to the tensor memory accelerator; numbers as cuTensorMapEncodeTiled has them.

    array  the argument that is described: what it holds, where, and with which strides, is known at launch
    box    elements that one copy takes along each dimension, the last dimension of the array first
    steps  between them
    """

    array: str
    data_type: int
    box: tuple[int, ...]
    steps: tuple[int, ...]
    interleave: int
    swizzle: int
    promotion: int
    fill: int


@functools.cache
def _driver() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise CudaError(f"no NVIDIA driver on this machine: {error}") from error


def _call(name: str, *arguments: object) -> None:
    status = getattr(_driver(), name)(*arguments)
    if status:
        text = ctypes.c_char_p()
        _driver().cuGetErrorName(status, ctypes.byref(text))
        raise CudaError(f"{name} failed: {(text.value or b'unknown error').decode()}")


@dataclass(frozen=True, slots=True, kw_only=True)
class CubinFunction:
    """One function of a loaded binary, called with a grid and its arguments by name; it takes those it has.

    parameters   (type, name) in the order of the function
    tensor_maps  what describes arrays, by the name of its parameter
    """

    handle: ctypes.c_void_p
    parameters: tuple[tuple[str, str], ...]
    threads: int
    smem_bytes: int
    tensor_maps: Mapping[str, TensorMap]

    def __call__(self, grid: tuple[int, ...], **arguments: Any) -> None:
        if 0 in grid:
            return
        values = [self._value(kind, name, arguments) for kind, name in self.parameters]
        addresses = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        blocks = (*grid, *(1,) * (3 - len(grid)))
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        shape = (*blocks, self.threads, 1, 1, self.smem_bytes)
        _call("cuLaunchKernel", self.handle, *map(ctypes.c_uint, shape), stream, addresses, None)

    def _value(self, kind: str, name: str, arguments: Mapping[str, Any]) -> Any:
        if name in self.tensor_maps:
            tensor_map = self.tensor_maps[name]
            array: torch.Tensor = arguments[tensor_map.array]
            return _encoded(tensor_map, array.data_ptr(), *described(array))
        argument = arguments[name]
        if isinstance(argument, torch.Tensor):
            return ctypes.c_void_p(argument.data_ptr())
        return SCALARS[kind](argument)


def described(array: torch.Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Elements along each dimension, the last one first, and bytes between the elements of all but that one."""
    strides = [stride * array.element_size() for stride in array.stride()[:-1]]
    return tuple(reversed(array.shape)), tuple(reversed(strides))


@functools.lru_cache(maxsize=1024)  # a cache of keys stays where it is
def _encoded(tensor_map: TensorMap, address: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> Any:
    room = (ctypes.c_ubyte * (TENSOR_MAP_BYTES + TENSOR_MAP_ALIGNMENT))()
    place = (ctypes.c_ubyte * TENSOR_MAP_BYTES).from_buffer(room, -ctypes.addressof(room) % TENSOR_MAP_ALIGNMENT)
    rank = len(shape)
    words, longs = ctypes.c_uint32 * rank, ctypes.c_uint64 * rank
    _call(
        "cuTensorMapEncodeTiled",
        ctypes.c_void_p(ctypes.addressof(place)),
        ctypes.c_int(tensor_map.data_type),
        ctypes.c_uint32(rank),
        ctypes.c_void_p(address),
        longs(*shape),
        longs(*strides),
        words(*tensor_map.box),
        words(*tensor_map.steps),
        *(
            ctypes.c_int(option)
            for option in (tensor_map.interleave, tensor_map.swizzle, tensor_map.promotion, tensor_map.fill)
        ),
    )
    return place


def load_folder(folder: Path) -> dict[str, CubinFunction]:
    """Every function of a compiled folder by its name, as kernels.json there describes it. Raises CudaError."""
    return {one["name"]: _described_function(folder, one) for one in json.loads((folder / MANIFEST).read_bytes())}


def _described_function(folder: Path, function: Mapping[str, Any]) -> CubinFunction:
    tensor_maps = {
        name: TensorMap(**{**fields, "box": tuple(fields["box"]), "steps": tuple(fields["steps"])})
        for name, fields in function["tensor_maps"].items()
    }
    return load(
        (folder / f"{function['name']}.cubin").read_bytes(),
        function["symbol"],
        tuple((kind, name) for kind, name in function["parameters"]),
        function["threads"],
        function["smem_bytes"],
        tensor_maps,
    )


def load(
    binary: bytes,
    symbol: str,
    parameters: tuple[tuple[str, str], ...],
    threads: int,
    smem_bytes: int,
    tensor_maps: Mapping[str, TensorMap],
) -> CubinFunction:
    """A function of a binary, loaded on torch's current device for the life of the process. Raises CudaError."""
    torch.zeros(1, device="cuda")  # makes torch's context the current one
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    _call("cuModuleLoadData", ctypes.byref(module), binary)
    _call("cuModuleGetFunction", ctypes.byref(function), module, symbol.encode())
    _call("cuFuncSetAttribute", function, MAX_DYNAMIC_SHARED_SIZE_BYTES, smem_bytes)
    return CubinFunction(
        handle=function, parameters=parameters, threads=threads, smem_bytes=smem_bytes, tensor_maps=tensor_maps
    )
