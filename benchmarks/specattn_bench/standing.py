"""Where each series stands: beside the ceilings of its run, its floor, and other series of its case."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from specattn_bench.ceilings import Ceilings
from specattn_bench.roofline import Floor, floor_of
from specattn_bench.series import Series
from specattn_codegen.tuning.outcome import Timing

AnyCase = Series[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Beside:
    """How many times as fast a series is as the fastest of some others of its case.

    key, column, said  what it is called in JSON, in a table and in a picture
    others             which those are
    """

    key: str
    column: str
    said: str
    others: Callable[[AnyCase], bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """One timed series.

    gbs               10^9 bytes a second of the least it must move
    share_of_read     of the read ceiling of the same run
    share_of_gather   of the ceiling of scattered rows; None where memory is read in order
    floor             the time that the least bytes and operations take at the ceilings
    ratios            by a Beside's key; None where its case has no such series
    """

    series: AnyCase
    timing: Timing
    gbs: float
    share_of_read: float
    share_of_gather: float | None
    floor: Floor
    ratios: dict[str, float | None]

    @property
    def share_of_floor(self) -> float:
        return self.floor.microseconds / self.timing.median_us


def standings(series: Sequence[AnyCase], ceilings: Ceilings, besides: Sequence[Beside]) -> list[Standing]:
    """One for every timed series, in their order."""
    timed = [(one, one.timing) for one in series if one.timing is not None]
    return [_standing(one, timing, timed, ceilings, besides) for one, timing in timed]


def _standing(
    series: AnyCase,
    timing: Timing,
    timed: Sequence[tuple[AnyCase, Timing]],
    ceilings: Ceilings,
    besides: Sequence[Beside],
) -> Standing:
    rate = series.work.memory_bytes / timing.median_us / 1e3
    ratios: dict[str, float | None] = {}
    for beside in besides:
        others = [t.median_us for one, t in timed if one.case == series.case and beside.others(one)]
        ratios[beside.key] = min(others) / timing.median_us if others else None
    return Standing(
        series=series,
        timing=timing,
        gbs=rate,
        share_of_read=rate / ceilings.bandwidth_gbs,
        share_of_gather=None if series.scattered is None else rate / ceilings.gather_gbs[series.scattered],
        floor=floor_of(series.work, series.case.dtype, ceilings),
        ratios=ratios,
    )
