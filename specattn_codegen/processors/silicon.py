"""Silicon and Arch: which processors are one to a kernel, how far two others lie apart, and the Arch a pack is for."""

from __future__ import annotations

import dataclasses
import math

from specattn_codegen.environment import Silicon, silicon
from specattn_codegen.errors import SpecError
from specattn_codegen.processors import cpu_info, gpus
from specattn_codegen.processors.arch import Arch


def same(first: Silicon, second: Silicon) -> bool:
    """Whether kernels cannot tell the two apart. A product's name is no fact of the silicon."""
    return dataclasses.replace(first, name="") == dataclasses.replace(second, name="")


def are_siblings(first: Silicon, second: Silicon) -> bool:
    """Whether code made for one runs on the other: one instruction set, in another size."""
    return (first.vendor, first.compute_capability, first.target) == (
        second.vendor,
        second.compute_capability,
        second.target,
    )


def distance(first: Silicon, second: Silicon) -> float:
    """Octaves between two siblings, summed over multiprocessors (or cores), last-level cache and bandwidth."""
    pairs = (
        (first.num_sms, second.num_sms),
        (first.l2_bytes, second.l2_bytes),
        (first.bandwidth_gbs, second.bandwidth_gbs),
    )
    return sum(abs(math.log2(max(one, 1) / max(other, 1))) for one, other in pairs)


def arch_of(found: Silicon) -> Arch:
    """The Arch a pack was made for: the registry's row, or its nearest relative with the pack's own numbers.

    Raises SpecError for a GPU whose compute capability has no row.
    """
    if found.vendor == "cpu":
        relative = cpu_info.detect(measure=False)
    else:
        kin = [row for row in gpus.GPUS.values() if are_siblings(silicon(row), found)]
        if not kin:
            known = ", ".join(sorted({row.target for row in gpus.GPUS.values()}))
            raise SpecError(f"{found.name}: no kernels are made for {found.target}; known are {known}")
        relative = min(kin, key=lambda row: distance(silicon(row), found))
    if same(silicon(relative), found):
        return relative
    return dataclasses.replace(
        relative,
        name=found.name,
        target=found.target,
        num_sms=found.num_sms,
        smem_per_block=found.smem_per_block,
        l2_bytes=found.l2_bytes,
        bandwidth_gbs=found.bandwidth_gbs,
        cpu_model=found.cpu_model,
    )
