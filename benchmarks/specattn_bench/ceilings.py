"""What this machine can do at all, measured in the run that is held against it: reading memory, and multiplying."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from specattn_codegen import cpu_info
from specattn_codegen.arch import Arch
from specattn_codegen.problems import TORCH_DTYPES
from specattn_codegen.spec import Dtype

MATRIX_EXTENT = 1536  # three matrices outgrow the private caches; a product takes some hundredths of a second
REPEATS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceilings:
    """bandwidth_gbs: best of several read patterns over at least four times the last-level cache; tflops by dtype: the
    better of multiply-adds in registers and torch's matrix product. All threads, 10^9 and 10^12 a second."""

    bandwidth_gbs: float
    tflops: dict[str, float]


def measure(arch: Arch, dtypes: Sequence[Dtype]) -> Ceilings:
    rates = cpu_info.measure_rates(arch.target, torch.get_num_threads(), arch.l2_bytes)
    products = {dtype: matrix_tflops(dtype) for dtype in dict.fromkeys(("float32", *dtypes))}
    registers = {"bfloat16": rates["bf16_tflops"]}
    return Ceilings(
        bandwidth_gbs=rates["bandwidth_gbs"],
        tflops={
            dtype: round(max(rate, rates["fp32_tflops"], registers.get(dtype, 0.0)), 4)
            for dtype, rate in products.items()
        },
    )


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
    )
