"""What is asked of mixed attention: the cases, the kernels, and batches that no cache holds from turn to turn."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from specattn_bench.plans import Plans
from specattn_bench.sparse_series import disjoint_selections
from specattn_codegen.cost_model.floor import Work, least_work
from specattn_codegen.heads import HeadConfig
from specattn_codegen.proof.problems import AttentionProblem, attention_problem
from specattn_codegen.spec import Dtype, KernelSpec, Op, ScoreSpec, Workload
from specattn_codegen.tuning.measure import rotated

COPIES = 4  # of the cache: what a turn verifies was last read two turns ago


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """requests of which the first `verifying` verify `rows` rows and the others draft one."""

    dtype: Dtype
    requests: int
    verifying: int
    rows: int
    keys: int
    budget: int

    @property
    def name(self) -> str:
        return f"{self.dtype}, {self.verifying} of {self.requests} verify {self.rows} rows"

    @property
    def drafting(self) -> int:
        return self.requests - self.verifying

    @property
    def verify_workload(self) -> Workload:
        return Workload(batch=self.verifying, q_len=self.rows, kv_len=self.keys)

    @property
    def draft_workload(self) -> Workload:
        return Workload(batch=self.drafting, q_len=1, kv_len=self.keys, budget=self.budget)

    @property
    def workload(self) -> Workload:
        return dataclasses.replace(self.verify_workload, batch=self.requests, budget=self.budget)

    def facts(self) -> dict[str, object]:
        return dataclasses.asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What is the same for all cases."""

    heads: HeadConfig
    cases: tuple[Case, ...]
    page_size: int
    plans: Plans

    def spec(self, case: Case, op: Op, *, page_size: int = 0) -> KernelSpec:
        """One selection a KV head, and the scores that it is made of."""
        return KernelSpec(
            op=op,
            heads=self.heads,
            dtype=case.dtype,
            page_size=page_size,
            score=None if op == "sparse_attention" else ScoreSpec(),
            selection=None if op == "verify_attention" else "kv_head",
        )

    def kernels(self) -> list[tuple[KernelSpec, Workload]]:
        return [(self.spec(case, "mixed_attention"), case.workload) for case in self.cases]

    def work(self, case: Case) -> Work:
        verified = least_work(self.spec(case, "verify_attention"), case.verify_workload)
        drafted = least_work(self.spec(case, "sparse_attention"), case.draft_workload)
        return Work(
            memory_bytes=verified.memory_bytes + drafted.memory_bytes,
            operations=verified.operations + drafted.operations,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Batches:
    """One turn: the mixed batch, its two parts, and as many requests all verifying."""

    mixed: AttentionProblem
    verifying: AttentionProblem
    drafting: AttentionProblem
    all_verifying: AttentionProblem


def batches_of(asked: Asked, case: Case, seed: int) -> list[Batches]:
    """One a copy of the cache. Requests that draft share a copy and no selected key; those that verify read one after
    the other, each more than a cache holds."""
    base = attention_problem(
        asked.spec(case, "verify_attention"),
        q_lens=[case.rows],
        kv_lens=[case.keys],
        page_size=asked.page_size,
        seed=seed,
    )
    base = dataclasses.replace(base, max_kv=case.keys, lse_ref=None)
    selections = disjoint_selections(
        asked.heads.num_kv_heads, case.keys - case.rows, case.budget, 1, case.drafting, seed
    )
    caches = rotated(base, COPIES)
    return [_batches(case, caches[turn], caches[(turn + COPIES // 2) % COPIES], selections) for turn in range(COPIES)]


def _batches(
    case: Case, verified: AttentionProblem, drafted: AttentionProblem, selections: Sequence[torch.Tensor]
) -> Batches:
    verifying = _joined([verified] * case.verifying, [case.rows] * case.verifying)
    rows = [1] * case.drafting
    drafting = _joined([drafted] * case.drafting, rows, [selections[i % len(selections)] for i in range(case.drafting)])
    padding = [selections[0]] * case.verifying  # which no one reads
    assert drafting.indices is not None
    mixed = _joined(
        [verified] * case.verifying + [drafted] * case.drafting,
        [case.rows] * case.verifying + rows,
        [*padding, *drafting.indices.split(1)],
    )
    modes = torch.tensor([0] * case.verifying + [1] * case.drafting, dtype=torch.int32)
    return Batches(
        mixed=dataclasses.replace(mixed, mode=modes),
        verifying=verifying,
        drafting=drafting,
        all_verifying=_joined([verified] * case.requests, [case.rows] * case.requests),
    )


def _joined(
    requests: Sequence[AttentionProblem], rows: Sequence[int], selections: Sequence[torch.Tensor] = ()
) -> AttentionProblem:
    """Requests over one pool as one batch, of the last `rows` rows each."""
    indices = torch.cat(list(selections)) if selections else None
    lengths = torch.cat([request.kv_lens for request in requests])
    return dataclasses.replace(
        requests[0],
        q=torch.cat([request.q[-count:] for request, count in zip(requests, rows, strict=True)]),
        page_table=torch.cat([request.page_table for request in requests]),
        kv_lens=lengths,
        cu_q=torch.tensor([0, *rows]).cumsum(0).int(),
        max_q=max(rows),
        indices=indices,
        counts=None if indices is None else indices.new_full(indices.shape[:2], indices.shape[2]),
        tail_start=lengths - torch.tensor(rows, dtype=torch.int32),
    )
