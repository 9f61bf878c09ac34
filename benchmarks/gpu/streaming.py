"""Kernels that only read: what a memory can give when nothing is computed."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

TILES_PER_PROGRAM = 16


@triton.jit
def read_tiles(source, sums, tiles: tl.constexpr, tile: tl.constexpr):
    program = tl.program_id(0)
    total = tl.zeros([tile], dtype=tl.int32)
    for number in range(tiles):
        place = (program.to(tl.int64) * tiles + number) * tile
        total += tl.load(source + place + tl.arange(0, tile))
    tl.store(sums + program, tl.sum(total, axis=0))


def read(source: torch.Tensor, sums: torch.Tensor, tile: int, num_warps: int) -> None:
    """Reads all of source, int32 of a whole number of programs' tiles; sums keeps it from being optimised away."""
    programs = source.numel() // (TILES_PER_PROGRAM * tile)
    read_tiles[(programs,)](source, sums, tiles=TILES_PER_PROGRAM, tile=tile, num_warps=num_warps)  # pyright: ignore[reportCallIssue]
