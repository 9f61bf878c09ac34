"""What is asked of sparse attention: the cases, the kernels, and selections that no cache holds from turn to turn."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from specattn_bench.modelled import Wanted
from specattn_bench.plans import Plans
from specattn_codegen.heads import HeadConfig
from specattn_codegen.spec import Dtype, KernelSpec, ScoreHeads, Workload

SELECTIONS: dict[str, ScoreHeads] = {"per-head": "kv_head", "per-layer": "layer"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One request. selection: one of SELECTIONS; block: keys an index names; budget: selected keys of a head."""

    dtype: Dtype
    rows: int
    keys: int
    budget: int
    selection: str
    block: int

    @property
    def name(self) -> str:
        rows = f"{self.rows} row" + ("s" if self.rows > 1 else "")
        grain = f"pages of {self.block}" if self.block > 1 else "tokens"
        return f"{self.dtype}, {rows}, {self.selection} {grain}"

    @property
    def workload(self) -> Workload:
        return Workload(batch=1, q_len=self.rows, kv_len=self.keys, budget=self.budget)

    @property
    def tail_start(self) -> int:
        return self.keys - self.rows

    def facts(self) -> dict[str, object]:
        return {
            "dtype": self.dtype,
            "rows": self.rows,
            "keys": self.keys,
            "budget": self.budget,
            "selection": self.selection,
            "block": self.block,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What is the same for all cases."""

    heads: HeadConfig
    cases: tuple[Case, ...]
    page_size: int
    plans: Plans

    def sparse_spec(self, case: Case, *, page_size: int = 0) -> KernelSpec:
        return KernelSpec(
            op="sparse_attention",
            heads=self.heads,
            dtype=case.dtype,
            page_size=page_size,
            selection=SELECTIONS[case.selection],
        )

    def verify_spec(self, case: Case) -> KernelSpec:
        return KernelSpec(op="verify_attention", heads=self.heads, dtype=case.dtype)

    def kernels(self) -> list[tuple[KernelSpec, Workload]]:
        return [(self.sparse_spec(case), case.workload) for case in self.cases]

    def for_gpus(self) -> list[Wanted]:
        """Tokens only: the cost model counts bytes, and pages are as many."""
        return [
            Wanted(
                case=case.name,
                series=f"sparse_attention, {case.selection}",
                spec=self.sparse_spec(case, page_size=self.page_size),
                workload=case.workload,
            )
            for case in self.cases
            if case.block == 1
        ]

    def row_bytes(self, case: Case) -> int:
        """Bytes that lie together wherever a selection may point: of one head or, where they share it, of all; the
        pages of all heads lie together as well, those of one do not."""
        row = self.heads.head_dim * self.sparse_spec(case).cache_bytes
        return row if case.selection == "per-head" else row * self.heads.num_kv_heads * case.block


def disjoint_selections(
    rows: int, tail_start: int, budget: int, block: int, count: int, seed: int
) -> list[torch.Tensor]:
    """At most `count` selections [1, rows, K] int32, ascending, of whole blocks before the tail; no two of a row share
    one, so that what one reads is not what the one before has left in a cache."""
    generator = torch.Generator().manual_seed(seed)
    blocks, wanted = tail_start // block, budget // block
    order = torch.stack([torch.randperm(blocks, generator=generator) for _ in range(rows)])
    chunks = order[:, : blocks // wanted * wanted].split(wanted, dim=1)[:count]
    return [chunk.sort(dim=1).values.int()[None].contiguous() for chunk in chunks]
