"""Arch: a processor's limits and ceilings. Knows no kernel and no plan. Rows: gpus.py, cpu_info.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Vendor = Literal["nvidia", "amd", "cpu"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Arch:
    """One processor. Rates are peaks of the data sheet for GPUs and measured for the CPU.

    name                 as a user types it: h100, mi300x, cpu
    vendor               nvidia | amd | cpu
    compute_capability   90, 100, 120 for NVIDIA; 942 for gfx942; 0 for the CPU
    target               the compiler's name: sm_90a, gfx942, x86-64 with its vector extensions
    num_sms              streaming multiprocessors, compute units, or CPU cores
    smem_per_block       bytes of shared memory one block may use (opt-in limit)
    smem_per_sm          bytes of shared memory of one multiprocessor
    registers_per_sm     32-bit registers of one multiprocessor
    max_threads_per_sm   resident threads
    warp_size            32 or 64
    l2_bytes             last-level cache
    memory_bytes         device memory
    bandwidth_gbs        memory bandwidth, 10^9 bytes per second
    bf16_tflops          dense bfloat16 matrix rate, 10^12 operations per second
    fp32_tflops          float32 vector rate
    clock_ghz            boost clock
    source               where the row was read from
    cpu_model            vendor, family and model of a CPU, which tell its cores from others; empty for a GPU
    fit                  what measurements have shown the cost model's terms to be off by here, a factor for each limit;
                         empty for the model as it is
    """

    name: str
    vendor: Vendor
    compute_capability: int
    target: str
    num_sms: int
    smem_per_block: int
    smem_per_sm: int
    registers_per_sm: int
    max_threads_per_sm: int
    warp_size: int
    l2_bytes: int
    memory_bytes: int
    bandwidth_gbs: float
    bf16_tflops: float
    fp32_tflops: float
    clock_ghz: float
    source: str
    cpu_model: str = ""
    fit: tuple[tuple[str, float], ...] = ()

    @property
    def is_gpu(self) -> bool:
        return self.vendor != "cpu"
