"""What is asked of verification: the score definitions by name, the cases, and the series of each."""

from __future__ import annotations

from dataclasses import dataclass

from specattn_bench import series
from specattn_bench.modelled import Wanted
from specattn_bench.plans import Plans
from specattn_codegen.heads import HeadConfig
from specattn_codegen.spec import Dtype, KernelSpec, ScoreSpec, Workload

SCORES: dict[str, ScoreSpec | None] = {
    "none": None,
    "reference": ScoreSpec(rows="all", heads="kv_head", normaliser="reference"),
    "reference-histogram": ScoreSpec(rows="all", heads="kv_head", normaliser="reference", histogram=True),
    "ends-layer": ScoreSpec(rows="ends", heads="layer"),
    "all-kv_head": ScoreSpec(rows="all", heads="kv_head"),
}
READING = "reading K and V in order"


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

    def facts(self) -> dict[str, object]:
        size = self.workload
        return {"dtype": self.dtype, "batch": size.batch, "rows": size.q_len, "keys": size.kv_len}


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What is the same for all cases. scores: names of SCORES."""

    heads: HeadConfig
    cases: tuple[Case, ...]
    scores: tuple[str, ...]
    page_size: int
    plans: Plans

    def spec(self, case: Case, scores: str, *, page_size: int = 0) -> KernelSpec:
        """The kernel of one of SCORES; page_size only where a kernel is specialised to it."""
        return KernelSpec(
            op="verify_attention", heads=self.heads, dtype=case.dtype, page_size=page_size, score=SCORES[scores]
        )

    def kernels(self) -> list[tuple[KernelSpec, Workload]]:
        return [(self.spec(case, scores), case.workload) for case in self.cases for scores in self.scores]

    def for_gpus(self) -> list[Wanted]:
        return [
            Wanted(
                case=case.name,
                series="no scores" if scores == "none" else scores,
                spec=self.spec(case, scores, page_size=self.page_size),
                workload=case.workload,
            )
            for scores in self.scores
            for case in self.cases
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Series(series.Series[Case]):
    """name: of ours the score definition, one of SCORES; scored: whether it gives scores besides the output; beside
    is what only reads the caches."""

    scored: bool

    @property
    def label(self) -> str:
        return f"ours, {self.name if self.scored else 'no scores'}" if self.kind == "ours" else self.name
