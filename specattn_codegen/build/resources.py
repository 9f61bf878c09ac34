"""What a compiled kernel takes from the processor, read from its binary."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Resources:
    """One device function of a source.

    kernel        its name
    registers     32-bit registers per thread
    spill_bytes   stack per thread
    smem_bytes    shared memory per block
    num_warps     warps per block
    binary_bytes  size of the machine code
    """

    kernel: str
    registers: int
    spill_bytes: int
    smem_bytes: int
    num_warps: int
    binary_bytes: int


def footprint(resources: tuple[Resources, ...]) -> tuple[int, int]:
    """What a plan's kernels take of the processor, to compare plans by: bytes of shared memory, then registers."""
    return (
        sum(kernel.smem_bytes for kernel in resources),
        sum(kernel.registers * kernel.num_warps for kernel in resources),
    )
