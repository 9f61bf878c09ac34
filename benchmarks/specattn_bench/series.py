"""A series: one way to do a case's work, and what became of it. Knows no operation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, Literal, Protocol, TypeVar

from specattn_bench.plans import Chosen
from specattn_codegen.cost_model.floor import Work
from specattn_codegen.spec import Dtype
from specattn_codegen.tuning.outcome import Timing

Kind = Literal["ours", "beside", "peer"]


class Case(Protocol):
    """What all series of a case share, and are timed in turns for. Hashable."""

    @property
    def name(self) -> str: ...

    @property
    def dtype(self) -> Dtype: ...

    def facts(self) -> dict[str, object]:
        """The case in a JSON object."""
        ...


CaseT = TypeVar("CaseT", bound=Case)


@dataclass(frozen=True, slots=True, kw_only=True)
class Series(Generic[CaseT]):
    """One way to do the case's work. refused says why it was not timed; timing is None exactly then.

    name       how it goes about it
    kind       ours; beside, what ours is held against that is ours, too; or a peer
    work       the least bytes and operations of what it does
    scattered  bytes of the rows that it reads from anywhere; None where it reads memory in order
    """

    case: CaseT
    name: str
    kind: Kind
    work: Work
    scattered: int | None = None
    chosen: Chosen | None = None
    timing: Timing | None = None
    refused: str = ""

    @property
    def label(self) -> str:
        return f"ours, {self.name}" if self.kind == "ours" else self.name


AnySeries = TypeVar("AnySeries", bound=Series)
Contender = tuple[AnySeries, Callable[[], None] | None]  # a series and one of its turns; None where it is refused
