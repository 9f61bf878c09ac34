"""What is asked of selection: the rules by name, the cases, and the kernel."""

from __future__ import annotations

from dataclasses import dataclass

from specattn_bench.modelled import Wanted
from specattn_bench.plans import Plans
from specattn_codegen.heads import HeadConfig
from specattn_codegen.policy import Policy, Threshold, TopK, TopP
from specattn_codegen.spec import Dtype, KernelSpec, Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """block: keys for which one score stands."""

    policy: Policy
    block: int = 1


BISECTED = 10  # halvings, as SpecAttn has them (arXiv 2510.27641)
RULES = {
    "top-2048": Rule(policy=TopK(k=2048)),
    "top-5%": Rule(policy=TopK(ratio=0.05)),
    "top-p-0.95": Rule(policy=TopP(0.95)),
    "threshold": Rule(policy=Threshold(0.0333)),  # which a sixteenth of problems.random_scores reach
    "pages-2048": Rule(policy=TopK(k=2048), block=16),
}
VERIFY_ROWS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """Rows of scores, and the rule. verified: the cache's dtype of the layers whose verification stands beside it."""

    layers: int
    batch: int
    heads: int
    keys: int
    rule: str
    threads: int
    verified: Dtype | None = None

    @property
    def name(self) -> str:
        rows = f"{self.batch * self.heads} rows of {self.keys:,}, {self.rule}"
        layers = f"{self.layers} layers of " if self.layers > 1 else ""
        threads = ", 1 thread" if self.threads == 1 else ""
        return f"{layers}{rows}{threads}{', ' + self.verified if self.verified else ''}"

    @property
    def dtype(self) -> Dtype:
        return "float32"

    @property
    def columns(self) -> int:
        return self.keys // RULES[self.rule].block

    @property
    def workload(self) -> Workload:
        """Columns in place of keys, as their number is what a selection's time depends on."""
        rule = RULES[self.rule]
        return Workload(
            batch=self.layers * self.batch,
            q_len=1,
            kv_len=self.columns + 1,
            budget=rule.policy.most_keys(self.keys) // rule.block,
        )

    def facts(self) -> dict[str, object]:
        return {
            "layers": self.layers,
            "batch": self.batch,
            "rows": self.batch * self.heads,
            "keys": self.keys,
            "columns": self.columns,
            "rule": self.rule,
            "threads": self.threads,
            "verified": self.verified,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What is the same for all cases. page_size: of the cache that is verified."""

    heads: HeadConfig
    cases: tuple[Case, ...]
    page_size: int
    plans: Plans

    @property
    def spec(self) -> KernelSpec:
        return KernelSpec(op="select_kv", heads=self.heads, selection="kv_head")

    def kernels(self) -> list[tuple[KernelSpec, Workload]]:
        return [(self.spec, case.workload) for case in self.cases]

    def for_gpus(self) -> list[Wanted]:
        """Top-k only, whose passes are what the cost model counts."""
        return [
            Wanted(case=case.name, series="select_kv", spec=self.spec, workload=case.workload)
            for case in self.cases
            if isinstance(RULES[case.rule].policy, TopK)
        ]
