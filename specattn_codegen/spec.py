"""KernelSpec: what to compute. Structure only; a size that changes from call to call belongs to Workload."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from specattn_codegen.errors import SpecError
from specattn_codegen.heads import HeadConfig

Op = Literal["verify_attention", "select_kv", "sparse_attention"]
Dtype = Literal["float32", "float16", "bfloat16"]
ScoreRows = Literal["all", "ends", "last"]
ScoreHeads = Literal["kv_head", "layer"]

OPS: tuple[Op, ...] = get_args(Op)
DTYPES: tuple[Dtype, ...] = get_args(Dtype)
DTYPE_BYTES: dict[str, int] = {"float32": 4, "float16": 2, "bfloat16": 2}


def require_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        raise SpecError(f"{name}={value!r}: must be one of {', '.join(map(str, choices))}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreSpec:
    """How verification scores a prefix key: `mean over rows and heads of exp(scale * q . k - lse)`.

    rows   which verify rows: all; ends (the first and the last, a single row counting once); last
    heads  kv_head: one score per KV head, mean over its group; layer: one score, mean over all query heads

    The denominator is fixed, rows x heads: a key outside a row's window contributes 0.
    `rows="all", heads="kv_head"` is PillarAttn's score (arXiv 2512.01278), `rows="ends", heads="layer"` is
    Vegas' (arXiv 2602.07223).
    """

    rows: ScoreRows = "all"
    heads: ScoreHeads = "kv_head"
    value: Literal["weight"] = "weight"
    normaliser: Literal["exact"] = "exact"
    granularity: Literal["token"] = "token"

    def __post_init__(self) -> None:
        require_choice("rows", self.rows, get_args(ScoreRows))
        require_choice("heads", self.heads, get_args(ScoreHeads))
        require_choice("value", self.value, ("weight",))
        require_choice("normaliser", self.normaliser, ("exact",))
        require_choice("granularity", self.granularity, ("token",))

    @property
    def name(self) -> str:
        return f"{self.rows}-{self.heads}"


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelSpec:
    """One kernel's structure.

    op         verify_attention | select_kv | sparse_attention
    heads      the attention heads
    dtype      of q, the KV cache and out (select_kv always reads float32 scores)
    page_size  keys per page; 0 where the backend takes it as a run-time argument (the CPU)
    score      verify_attention: the scores to emit, None for none
    selection  select_kv and sparse_attention: one selection per KV head, or one for the whole layer
    """

    op: Op
    heads: HeadConfig
    dtype: Dtype = "float32"
    page_size: int = 0
    score: ScoreSpec | None = None
    selection: ScoreHeads | None = None

    def __post_init__(self) -> None:
        require_choice("op", self.op, OPS)
        require_choice("dtype", self.dtype, DTYPES)
        if self.page_size < 0:
            raise SpecError(f"page_size={self.page_size}: must be at least 1 key")
        if self.op == "verify_attention" and self.selection is not None:
            raise SpecError("verify_attention reads every key and takes no selection; leave selection out")
        if self.op != "verify_attention":
            if self.score is not None:
                raise SpecError(f"{self.op} emits no scores; leave score out")
            require_choice("selection", self.selection, get_args(ScoreHeads))

    @property
    def selection_heads(self) -> int:
        """S: score or selection rows per request."""
        kind = self.score.heads if self.score else self.selection
        return 1 if kind == "layer" else self.heads.num_kv_heads

    @property
    def dtype_bytes(self) -> int:
        return DTYPE_BYTES[self.dtype]

    @property
    def name(self) -> str:
        """As in `verify_attention-all-kv_head-bfloat16-p16`; unique within one HeadConfig."""
        parts = [self.op]
        if self.score:
            parts.append(self.score.name)
        if self.selection:
            parts.append(self.selection)
        if self.op != "select_kv":
            parts.append(self.dtype)
            parts.extend([f"p{self.page_size}"] if self.page_size else [])
        return "-".join(parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Run-time sizes of a call.

    batch   requests
    q_len   query rows per request (draft length + 1 for a verification, 1 for a draft step)
    kv_len  keys per request, the rows' own included
    budget  selected keys per selection row; 0 for verify_attention
    """

    batch: int
    q_len: int
    kv_len: int
    budget: int = 0

    def __post_init__(self) -> None:
        if self.batch < 1 or self.q_len < 1 or self.kv_len < self.q_len or self.budget < 0:
            raise SpecError(f"{self}: needs batch >= 1, 1 <= q_len <= kv_len and budget >= 0")

    @property
    def name(self) -> str:
        budget = f"-k{self.budget}" if self.budget else ""
        return f"b{self.batch}-q{self.q_len}-n{self.kv_len}{budget}"
