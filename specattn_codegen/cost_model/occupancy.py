"""How many blocks of a kernel one multiprocessor holds, from what its binary takes. The compiler has the last word."""

from __future__ import annotations

from specattn_codegen.build.resources import Resources
from specattn_codegen.processors.arch import Arch

REGISTER_UNIT = 8  # registers a thread are given in eights (CUDA occupancy calculator)
RESERVED_SMEM = 1024  # bytes CUDA keeps of every block's shared memory (capability 8.0 and later)
MAX_BLOCKS = 32


def blocks_per_sm(resources: Resources, arch: Arch) -> int:
    """Blocks that fit by shared memory, registers and threads; 0 where not even one does."""
    threads = resources.num_warps * arch.warp_size
    registers = -(-max(resources.registers, 1) // REGISTER_UNIT) * REGISTER_UNIT * threads
    return min(
        arch.smem_per_sm
        // (resources.smem_bytes + RESERVED_SMEM if arch.vendor == "nvidia" else resources.smem_bytes or 1),
        arch.registers_per_sm // registers,
        arch.max_threads_per_sm // threads,
        MAX_BLOCKS,
    )


def why_unfit(resources: tuple[Resources, ...], arch: Arch) -> str | None:
    """Why a compiled kernel cannot be launched on `arch`; None where it can."""
    for kernel in resources:
        if kernel.smem_bytes > arch.smem_per_block:
            return f"{kernel.kernel} takes {kernel.smem_bytes} bytes of shared memory of {arch.smem_per_block}"
        if blocks_per_sm(kernel, arch) < 1:
            return f"{kernel.kernel} takes {kernel.registers} registers a thread: no block fits {arch.name}"
    return None
