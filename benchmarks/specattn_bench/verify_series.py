"""What is asked of verification: the score definitions by name, the cases, and what became of each series."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from specattn_bench.plans import Chosen, Overrides, PlanSource
from specattn_codegen.heads import HeadConfig
from specattn_codegen.outcome import Timing
from specattn_codegen.spec import Dtype, KernelSpec, ScoreSpec, Workload

SCORES: dict[str, ScoreSpec | None] = {
    "none": None,
    "reference": ScoreSpec(rows="all", heads="kv_head", normaliser="reference"),
    "reference-histogram": ScoreSpec(rows="all", heads="kv_head", normaliser="reference", histogram=True),
    "ends-layer": ScoreSpec(rows="ends", heads="layer"),
    "all-kv_head": ScoreSpec(rows="all", heads="kv_head"),
}

Kind = Literal["ours", "peer"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One dtype and size. All series of a case are timed in turns."""

    dtype: Dtype
    workload: Workload

    @property
    def name(self) -> str:
        rows = f"{self.workload.q_len} row" + ("s" if self.workload.q_len > 1 else "")
        requests = f"{self.workload.batch} requests, " if self.workload.batch > 1 else ""
        return f"{self.dtype}, {requests}{rows}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What is the same for all cases. scores: names of SCORES."""

    heads: HeadConfig
    cases: tuple[Case, ...]
    scores: tuple[str, ...]
    page_size: int
    plan_source: PlanSource
    overrides: Overrides

    def spec(self, case: Case, scores: str, *, page_size: int = 0) -> KernelSpec:
        """The kernel of one of SCORES; page_size only where a kernel is specialised to it."""
        return KernelSpec(
            op="verify_attention", heads=self.heads, dtype=case.dtype, page_size=page_size, score=SCORES[scores]
        )

    def specs(self) -> list[KernelSpec]:
        return [self.spec(case, scores) for case in self.cases for scores in self.scores]


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One way to do the case's work. refused says why it was not timed; timing is None exactly then.

    name    of ours the score definition, one of SCORES; of a peer how it goes about it
    scored  whether it gives scores besides the output
    """

    case: Case
    name: str
    kind: Kind
    scored: bool
    chosen: Chosen | None = None
    timing: Timing | None = None
    refused: str = ""

    @property
    def label(self) -> str:
        if self.kind == "peer":
            return self.name
        return f"ours, {self.name if self.scored else 'no scores'}"
