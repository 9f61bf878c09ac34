"""A run: every case of a question timed, between two measurements of the machine's ceilings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic

from specattn_bench import ceilings, report
from specattn_bench.ceilings import Ceilings
from specattn_bench.series import AnySeries, CaseT
from specattn_codegen.digest import to_plain

BUSY = 0.7  # load average before a run above which its times are not to be believed


@dataclass(frozen=True, slots=True, kw_only=True)
class Run(Generic[AnySeries]):
    """series: of every case, in their order; before, after: the ceilings; load: the machine's average before the run"""

    series: list[AnySeries]
    before: Ceilings
    after: Ceilings
    load: float

    @property
    def best(self) -> Ceilings:
        return ceilings.best(self.before, self.after)

    @property
    def ceilings(self) -> dict[str, object]:
        return {"before": to_plain(self.before), "after": to_plain(self.after), "best": to_plain(self.best)}

    @property
    def warnings(self) -> list[str]:
        if self.load <= BUSY:
            return []
        return [f"the machine was busy before the run (load average {self.load}): repeat it when it is idle"]


def time_cases(
    cases: Sequence[CaseT],
    measure_case: Callable[[CaseT], list[AnySeries]],
    measure_ceilings: Callable[[], Ceilings],
) -> Run[AnySeries]:
    load = report.load_average()
    series: list[AnySeries] = []
    with report.Bar(len(cases)) as bar:
        bar.say("ceilings")
        before = measure_ceilings()
        for case in cases:
            bar.say(case.name)
            series += measure_case(case)
            bar.advance()
        bar.say("ceilings")
        after = measure_ceilings()
    return Run(series=series, before=before, after=after, load=load)
