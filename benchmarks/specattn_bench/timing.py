"""Series that take turns over data no cache holds. Knows launches and memory, not what they compute."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

from specattn_codegen.arch import Arch
from specattn_codegen.measure import copies

Launch = Callable[[], object]


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
