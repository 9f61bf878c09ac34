"""Lowers rendered TileLang to the text of a target's own language. Needs TileLang, and neither a GPU nor nvcc.

TileLang's autotuner and caches are never called: what is worth keeping is kept by its content, here as elsewhere.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import tilelang.cpu.language as cpu_language
import tilelang.language as cuda_language
from tilelang import tvm
from tilelang.backend.module import create_backend_context
from tilelang.engine.lower import lower_with_context
from tilelang.tileop.base import GemmWarpPolicy

from specattn_codegen.build.cubin import TensorMap
from specattn_codegen.build.module import import_source
from specattn_codegen.errors import BuildError
from specattn_codegen.processors.arch import Arch
from specattn_codegen.render import Source

# Templates bound every access themselves.
OPTIONS = {"tl.disable_safe_memory_legalize": True}
# The C target writes vectors in OpenCL's notation, which C++ has not.
C_OPTIONS = {**OPTIONS, "tirx.disable_vectorize": True}


@dataclass(frozen=True, slots=True, kw_only=True)
class Lowered:
    """One device function as text.

    name        as in the template
    symbol      as in the text
    text        CUDA C++, or C
    parameters  names in the order of the text, pointers among them
    threads     per block; 0 in C
    smem_bytes  of dynamic shared memory, asked for at launch
    tensor_maps parameters that describe an array, by name
    """

    name: str
    symbol: str
    text: str
    parameters: tuple[tuple[str, str], ...]
    threads: int
    smem_bytes: int
    tensor_maps: Mapping[str, TensorMap]


def lower_for_cuda(source: Source, arch: Arch, vector: int) -> tuple[Lowered, ...]:
    """CUDA C++ of every device function. Raises BuildError."""
    target = {"kind": "cuda", "arch": arch.target}
    return _lower(source, cuda_language, create_backend_context(target, None, "tvm_ffi"), OPTIONS, vector)


def lower_for_c(source: Source) -> tuple[Lowered, ...]:
    """C of every device function, one tile after the other, for checking results without a GPU. Raises BuildError."""
    return _lower(source, _c_dialect(), create_backend_context("c", None, "cython"), C_OPTIONS, vector=1)


def _c_dialect() -> SimpleNamespace:
    """TileLang's CPU language under the names of its CUDA language: it has no threads, hence one kind of memory and
    nothing to divide between warps."""
    names = {name: getattr(cpu_language, name) for name in dir(cpu_language) if not name.startswith("_")}

    def kernel(*blocks: Any, threads: int) -> Any:  # noqa: ARG001
        return cpu_language.Kernel(*blocks)

    def pipelined(steps: Any, num_stages: int) -> Any:  # noqa: ARG001
        return cpu_language.serial(steps)

    def gemm(a: Any, b: Any, c: Any, *, policy: GemmWarpPolicy, **options: Any) -> Any:  # noqa: ARG001
        return cpu_language.gemm(a, b, c, **options)

    def atomic_add(place: Any, value: Any) -> Any:
        return names["buffer_store"](place.buffer, place + value, place.indices)

    def sync_threads() -> None:
        """One thread waits for nobody."""

    memory = {"alloc_shared": cpu_language.alloc_local, "alloc_fragment": cpu_language.alloc_local}
    loops = {"Kernel": kernel, "Pipelined": pipelined, "Parallel": names["grid"]}
    threads = {"atomic_add": atomic_add, "cumsum": _running_sums, "sync_threads": sync_threads}
    return SimpleNamespace(**{**names, **memory, **loops, **threads, "gemm": gemm, "GemmWarpPolicy": GemmWarpPolicy})


@cpu_language.macro
def _running_sums(array: Any, dim: int, reverse: bool = False) -> None:
    """T.cumsum in place, along the last dimension."""
    length = array.shape[dim]
    for row in cpu_language.serial(array.shape[0] if dim else 1):
        for n in cpu_language.serial(1, length):
            place, before = (length - 1 - n, length - n) if reverse else (n, n - 1)
            if dim:
                array[row, place] += array[row, before]
            else:
                array[place] += array[before]


def _lower(source: Source, dialect: Any, context: Any, options: dict[str, Any], vector: int) -> tuple[Lowered, ...]:
    functions = import_source(source).device_functions(dialect, vector)
    return tuple(_lower_function(function, context, options) for function in functions)


def _lower_function(function: Any, context: Any, options: dict[str, Any]) -> Lowered:
    name = str(function.attrs["global_symbol"])
    try:
        with _complaints() as complaints, tvm.transform.PassContext(opt_level=3, config=options), context.target:
            artifact = lower_with_context(function, context)
    except (tvm.error.TVMError, TypeError, ValueError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise BuildError(f"{name}: TileLang: {lines[0] if lines else error!r}") from error
    race = next((line for line in complaints if "race" in line), None)
    if race is not None:
        raise BuildError(f"{name}: TileLang could not keep its threads apart: {race.strip()}")
    (device,) = artifact.device_mod.functions.values()
    symbol = str(device.attrs["global_symbol"])
    text = artifact.kernel_source
    return Lowered(
        name=name,
        symbol=symbol,
        text=text,
        parameters=_parameters(text, symbol),
        threads=_threads(text, symbol),
        smem_bytes=int(device.attrs.get("dyn_shared_memory_buf", 0)),
        tensor_maps=_tensor_maps(artifact.host_mod),
    )


def _tensor_maps(host_module: Any) -> dict[str, TensorMap]:
    """What the host would describe to the device before a launch: a type, a rank, a place, and by dimension sizes,
    strides, boxes and steps, then four options."""
    found: dict[str, TensorMap] = {}
    for function in host_module.functions.values():
        for parameter, arguments in function.attrs.get("tma_descriptor_args", {}).items():
            _, _, data_type, rank, array, *numbers = arguments
            size = int(rank)
            box, steps = (tuple(map(int, numbers[size * at : size * (at + 1)])) for at in (2, 3))
            interleave, swizzle, promotion, fill = map(int, numbers[4 * size :])
            found[parameter.name] = TensorMap(
                array=array.name,
                data_type=int(data_type),
                box=box,
                steps=steps,
                interleave=interleave,
                swizzle=swizzle,
                promotion=promotion,
                fill=fill,
            )
    return found


@contextlib.contextmanager
def _complaints() -> Iterator[list[str]]:
    """Lines that TileLang writes to standard error, in whatever language; of a race it only warns."""
    lines: list[str] = []
    with tempfile.TemporaryFile("w+") as caught:
        standard_error = os.dup(2)
        os.dup2(caught.fileno(), 2)
        try:
            yield lines
        finally:
            os.dup2(standard_error, 2)
            os.close(standard_error)
            caught.seek(0)
            lines.extend(caught.read().splitlines())


def _parameters(text: str, symbol: str) -> tuple[tuple[str, str], ...]:
    """(type, name) of each parameter, as the text declares them."""
    found = re.search(rf"{symbol}\(([^)]*)\)", text)
    if found is None:
        raise BuildError(f"TileLang's text declares no {symbol}")
    declared = (re.sub(r"__restrict__|__grid_constant__|const ", "", part).split() for part in found[1].split(","))
    return tuple((" ".join(words[:-1]), words[-1]) for words in declared)


def _threads(text: str, symbol: str) -> int:
    found = re.search(rf"__launch_bounds__\((\d+)[^)]*\)\s+{symbol}\(", text)
    return int(found[1]) if found else 0
