"""Series that take turns over data no cache holds. Knows launches and memory, not what they compute."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import torch

from specattn_codegen.processors.arch import Arch
from specattn_codegen.tuning.measure import Timer, copies, host_timer

Launch = Callable[[], object]

CACHES_OF_WEIGHTS = 4  # last-level caches


def after_weights(arch: Arch) -> Timer:
    """Times a launch of attention in the state in which a decode step comes to it: what was read last, in order, were
    weights. Otherwise a series pays for the state in which the one before it has left caches and prefetchers: after
    torch's attention ours took a fifth more time, until something was read. Selection is not timed so: it follows the
    verification that wrote its scores."""
    weights = torch.ones(CACHES_OF_WEIGHTS * arch.l2_bytes // 4)

    def timer(launch: Launch) -> float:
        weights.sum()
        return host_timer(launch)

    return timer


def turns(size_bytes: int, arch: Arch) -> tuple[int, Iterator[int]]:
    """How many copies of `size_bytes` of inputs are needed for a copy to have left every cache before its next turn,
    and whose turn it is. All series that read the same copies share the turns, so that none finds what the one before
    it has just brought in."""
    count = copies(size_bytes, arch)
    return count, itertools.cycle(range(count))


def in_turn(launches: Sequence[Launch], turn: Iterator[int]) -> Callable[[], None]:
    """One launch over the copies, one a call."""

    def launch() -> None:
        launches[next(turn)]()

    return launch
