"""Where each series stands: beside the ceilings of the run, its floor, its peers, and ours without scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from specattn_bench import peers
from specattn_bench.ceilings import Ceilings
from specattn_bench.roofline import Floor, cache_bytes, floor_of, method_work
from specattn_bench.verify_series import Asked, Series
from specattn_codegen.tuning.outcome import Timing


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """One timed series. Ratios above 1 mean faster than what is compared with.

    cache_gbs           10^9 bytes of K and V a second, each counted once
    share_of_read       of the read ceiling of the same run
    share_of_reading    the median of only reading K and V, in turns with the others, over this one's
    floor               the time that the least bytes and operations take at the ceilings
    share_of_floor      floor over median
    method_share        the same with what the plan's way to scores adds; ours with scores only
    over_none           median over that of ours without scores, less 1; ours with scores only
    to_best, to_plain   the fastest unscored peer's median, and the plain layout's, over this one's
    to_scored           the scored peer's median over this one's; ours with scores only
    """

    series: Series
    timing: Timing
    cache_gbs: float
    share_of_read: float
    share_of_reading: float
    floor: Floor
    share_of_floor: float
    method_share: float | None
    over_none: float | None
    to_best: float
    to_plain: float
    to_scored: float | None

    @property
    def gflops(self) -> float:
        return self.series.work.operations / self.timing.median_us / 1e3

    @property
    def intensity(self) -> float:
        """Operations a byte that must be moved."""
        return self.series.work.operations / self.series.work.memory_bytes


def standings(series: Sequence[Series], asked: Asked, ceilings: Ceilings) -> list[Standing]:
    """One for every timed series, in their order."""
    timed = [(one, one.timing) for one in series if one.timing is not None]
    return [_standing(one, timing, timed, asked, ceilings) for one, timing in timed]


def _standing(
    series: Series, timing: Timing, timed: Sequence[tuple[Series, Timing]], asked: Asked, ceilings: Ceilings
) -> Standing:
    same = [(other, t.median_us) for other, t in timed if other.case == series.case]
    ours = {other.name: median for other, median in same if other.kind == "ours"}
    reading = next(median for other, median in same if other.kind == "beside")
    theirs = {other.name: median for other, median in same if other.kind == "peer"}
    case, median = series.case, timing.median_us
    spec = asked.spec(case, series.name if series.kind == "ours" else "none")
    floor = floor_of(series.work, case.dtype, ceilings)
    rate = cache_bytes(spec, case.workload) / median / 1e3
    is_scored = series.kind == "ours" and series.scored
    method_share = None
    if is_scored and series.chosen is not None:
        method = method_work(spec, case.workload, series.chosen.plan)
        method_share = floor_of(method, case.dtype, ceilings).microseconds / median
    return Standing(
        series=series,
        timing=timing,
        cache_gbs=rate,
        share_of_read=rate / ceilings.bandwidth_gbs,
        share_of_reading=reading / median,
        floor=floor,
        share_of_floor=floor.microseconds / median,
        method_share=method_share,
        over_none=median / ours["none"] - 1 if is_scored and "none" in ours else None,
        to_best=min(time for name, time in theirs.items() if name != peers.WITH_SCORES) / median,
        to_plain=theirs[peers.PLAIN] / median,
        to_scored=theirs[peers.WITH_SCORES] / median if is_scored else None,
    )
