"""What this machine can do at all, measured in the run that is held against it: reading memory in order and in rows at
random, and multiplying."""

from __future__ import annotations

import ctypes
import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from specattn_codegen.build import cpu
from specattn_codegen.processors import cpu_info
from specattn_codegen.processors.arch import Arch
from specattn_codegen.proof.problems import TORCH_DTYPES
from specattn_codegen.render import render_text
from specattn_codegen.spec import Dtype

MATRIX_EXTENT = 1536  # three matrices outgrow the private caches; a product takes some hundredths of a second
REPEATS = 5
LINE_BYTES = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceilings:
    """bandwidth_gbs: best of several read patterns over many times the last-level cache; tflops by dtype: the
    better of multiply-adds in registers and torch's matrix product; gather_gbs by bytes of a row: the best of several
    ways to read rows that lie at random, in as much memory. All threads, 10^9 and 10^12 a second."""

    bandwidth_gbs: float
    tflops: dict[str, float]
    gather_gbs: dict[int, float] = field(default_factory=dict[int, float])


def measure(arch: Arch, dtypes: Sequence[Dtype], row_bytes: Sequence[int] = ()) -> Ceilings:
    """row_bytes: of the scattered rows whose rate is wanted."""
    rates = cpu_info.measure_rates(arch.target, torch.get_num_threads(), arch.l2_bytes)
    products = {dtype: matrix_tflops(dtype) for dtype in dict.fromkeys(("float32", *dtypes))}
    registers = {"bfloat16": rates["bf16_tflops"]}
    return Ceilings(
        bandwidth_gbs=rates["bandwidth_gbs"],
        tflops={
            dtype: round(max(rate, rates["fp32_tflops"], registers.get(dtype, 0.0)), 4)
            for dtype, rate in products.items()
        },
        gather_gbs={size: gather_gbs(arch, size) for size in dict.fromkeys(row_bytes)},
    )


def readers(arch: Arch) -> list[Callable[[torch.Tensor], None]]:
    """The patterns of the read ceiling: each reads a contiguous tensor in the order of memory, on all threads."""
    library = cpu.load_library(render_text("cpu/probe.cpp.jinja", target=arch.target), arch.target, "the machine probe")
    library.read_seconds.restype = ctypes.c_double
    threads = torch.get_num_threads()
    sink = torch.empty(threads)

    def read(pattern: int, data: torch.Tensor) -> None:
        floats, pointers = ctypes.c_int64(data.nbytes // 4), [ctypes.c_void_p(one.data_ptr()) for one in (data, sink)]
        library.read_seconds(pointers[0], floats, threads, pattern, pointers[1])

    return [functools.partial(read, pattern) for pattern in range(library.patterns())]


def gather_gbs(arch: Arch, row_bytes: int) -> float:
    """10^9 bytes a second of rows of whole cache lines, each read once, in an order drawn at random, out of many times
    the last-level cache; the best of several ways to overlap them."""
    library = cpu.load_library(render_text("cpu/probe.cpp.jinja", target=arch.target), arch.target, "the machine probe")
    library.gather_seconds.restype = ctypes.c_double
    lines, threads = -(-row_bytes // LINE_BYTES), torch.get_num_threads()
    data = torch.ones(cpu_info.read_bytes(arch.l2_bytes) // 4)
    rows = torch.randperm(data.nbytes // (lines * LINE_BYTES), generator=torch.Generator().manual_seed(0))
    sink = torch.empty(threads)
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (data, rows, sink)]
    seconds = min(
        library.gather_seconds(*pointers[:2], ctypes.c_int64(len(rows)), lines, threads, pattern, pointers[2])
        for _ in range(REPEATS)
        for pattern in range(library.gather_patterns())
    )
    return round(len(rows) * lines * LINE_BYTES / seconds / 1e9, 2)


def matrix_tflops(dtype: Dtype) -> float:
    """Rate of torch's product of two square matrices; best of several, since it is a ceiling."""
    matrix = torch.ones(MATRIX_EXTENT, MATRIX_EXTENT, dtype=TORCH_DTYPES[dtype])
    result = torch.empty_like(matrix)
    best = float("inf")
    for _ in range(REPEATS):
        start = time.perf_counter()
        torch.mm(matrix, matrix, out=result)
        best = min(best, time.perf_counter() - start)
    return 2 * MATRIX_EXTENT**3 / best / 1e12


def best(*measured: Ceilings) -> Ceilings:
    """The highest of each: a busy moment lowers a rate, and nothing raises one."""
    return Ceilings(
        bandwidth_gbs=max(one.bandwidth_gbs for one in measured),
        tflops={dtype: max(one.tflops[dtype] for one in measured) for dtype in measured[0].tflops},
        gather_gbs={size: max(one.gather_gbs[size] for one in measured) for size in measured[0].gather_gbs},
    )
