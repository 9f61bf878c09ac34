"""KernelSpec: what to compute. Structure only; a size that changes from call to call belongs to Workload."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from specattn_codegen.errors import SpecError
from specattn_codegen.heads import HeadConfig

Op = Literal["verify_attention", "select_kv", "sparse_attention", "mixed_attention"]
Dtype = Literal["float32", "float16", "bfloat16"]
KvDtype = Literal["float32", "float16", "bfloat16", "float8_e4m3", "float8_e5m2"]
ScoreRows = Literal["all", "ends", "last"]
ScoreHeads = Literal["kv_head", "layer"]
ScoreValue = Literal["weight", "logit"]
ScoreNormaliser = Literal["exact", "reference"]
ScoreGranularity = Literal["token", "page_mean", "page_max"]

OPS: tuple[Op, ...] = get_args(Op)
DTYPES: tuple[Dtype, ...] = get_args(Dtype)
FLOAT8 = ("float8_e4m3", "float8_e5m2")
DTYPE_BYTES: dict[str, int] = {"float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3": 1, "float8_e5m2": 1}
HISTOGRAM_BINS = 1024  # of non-negative float32 scores by their top 11 bits, `bits >> 21`: four bins an octave


def require_type(name: str, value: object, wanted: type | tuple[type, ...], fix: str) -> None:
    """Raises SpecError where a caller gives another kind of thing; fix says which to give, and how to get one."""
    if not isinstance(value, wanted):
        raise SpecError(f"{name} is of type {type(value).__name__}: must be {fix}")


def require_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        raise SpecError(f"{name}={value!r}: must be one of {', '.join(map(str, choices))}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreSpec:
    """How verification scores a prefix key: `mean over rows and heads of exp(scale * q . k - normaliser)`.

    rows         which verify rows: all; ends (the first and the last, a single row counting once); last
    heads        kv_head: one score per KV head, mean over its group; layer: one score, mean over all query heads
    value        weight: the softmax weight; logit: the mean of the scaled, softcapped logits over the rows that see
                 the key, -inf where none does
    normaliser   exact: each row's own log-sum-exp; reference: one the caller gives (`lse_ref`), as the draft steps of
                 the same tokens computed it. One pass, no weights kept, approximate
    granularity  token; page_mean or page_max of the token scores of a page's prefix keys
    histogram    also count each score row's scores by their top 11 bits (HISTOGRAM_BINS), for select_kv to start from

    The denominator of weights is fixed, rows x heads: a key outside a row's window contributes 0. With a reference, a
    row whose reference is not finite contributes 0, and a row whose largest logit passes its reference by more than
    2^64 is scaled down until it does not.
    `rows="all", heads="kv_head"` is PillarAttn's score (arXiv 2512.01278), `rows="ends", heads="layer"` is
    Vegas' (arXiv 2602.07223).
    """

    rows: ScoreRows = "all"
    heads: ScoreHeads = "kv_head"
    value: ScoreValue = "weight"
    normaliser: ScoreNormaliser = "exact"
    granularity: ScoreGranularity = "token"
    histogram: bool = False

    def __post_init__(self) -> None:
        require_choice("rows", self.rows, get_args(ScoreRows))
        require_choice("heads", self.heads, get_args(ScoreHeads))
        require_choice("value", self.value, get_args(ScoreValue))
        require_choice("normaliser", self.normaliser, get_args(ScoreNormaliser))
        require_choice("granularity", self.granularity, get_args(ScoreGranularity))
        require_choice("histogram", self.histogram, (False, True))
        if self.value == "logit" and self.normaliser == "reference":
            raise SpecError("value='logit', normaliser='reference': logits are not normalised; use normaliser='exact'")
        if self.value == "logit" and self.histogram:
            raise SpecError("value='logit', histogram=True: bins are of non-negative scores; use value='weight'")

    @property
    def name(self) -> str:
        """As in `all-kv_head` or `ends-layer-logit-page_max`: what differs from a token's exact weight is named."""
        changed = [
            self.value if self.value != "weight" else "",
            self.normaliser if self.normaliser != "exact" else "",
            self.granularity if self.granularity != "token" else "",
            "histogram" if self.histogram else "",
        ]
        return "-".join([self.rows, self.heads, *filter(None, changed)])

    @property
    def by_page(self) -> bool:
        return self.granularity != "token"

    def columns(self, max_prefix: int, page_size: int) -> int:
        """Score columns of a request of at most `max_prefix` prefix keys."""
        return -(-max_prefix // page_size) if self.by_page else max_prefix


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelSpec:
    """One kernel's structure.

    op         verify_attention | select_kv | sparse_attention
    heads      the attention heads
    dtype      of q and out (select_kv always reads float32 scores)
    kv_dtype   of the KV cache: dtype, which None stands for, or an 8-bit float with scales
    page_size  keys per page; 0 where the backend takes it as a run-time argument (the CPU)
    score      verify_attention and mixed_attention: the scores to emit, None for none
    selection  select_kv, sparse_attention and mixed_attention: one selection per KV head, or one for the whole layer
    """

    op: Op
    heads: HeadConfig
    dtype: Dtype = "float32"
    kv_dtype: KvDtype | None = None
    page_size: int = 0
    score: ScoreSpec | None = None
    selection: ScoreHeads | None = None

    def __post_init__(self) -> None:
        require_choice("op", self.op, OPS)
        require_type("heads", self.heads, HeadConfig, "a HeadConfig, as HeadConfig.from_model('llama3-8b')")
        if self.score is not None:
            require_type("score", self.score, ScoreSpec, "a ScoreSpec, as ScoreSpec(rows='all'), or None")
        require_choice("dtype", self.dtype, DTYPES)
        if self.kv_dtype == self.dtype or self.op == "select_kv":
            object.__setattr__(self, "kv_dtype", None)
        require_choice("kv_dtype", self.kv_dtype, (None, *FLOAT8))
        if self.page_size < 0:
            raise SpecError(f"page_size={self.page_size}: must be at least 1 key")
        if self.op == "verify_attention" and self.selection is not None:
            raise SpecError("verify_attention reads every key and takes no selection; leave selection out")
        if self.op != "verify_attention":
            require_choice("selection", self.selection, get_args(ScoreHeads))
        if self.op in ("select_kv", "sparse_attention") and self.score is not None:
            raise SpecError(f"{self.op} emits no scores; leave score out")

    @property
    def selection_heads(self) -> int:
        """S: selection rows per request, or score rows where the kernel takes no selection."""
        kind = self.selection or (self.score.heads if self.score else None)
        return 1 if kind == "layer" else self.heads.num_kv_heads

    @property
    def score_rows(self) -> int:
        """S of the scores: rows per request; 0 where the kernel emits none."""
        return 0 if self.score is None else 1 if self.score.heads == "layer" else self.heads.num_kv_heads

    @property
    def cache_dtype(self) -> KvDtype:
        return self.kv_dtype or self.dtype

    @property
    def is_float8(self) -> bool:
        """Whether the cache holds 8-bit floats, which come with a scale for K and one for V."""
        return self.kv_dtype is not None

    @property
    def dtype_bytes(self) -> int:
        return DTYPE_BYTES[self.dtype]

    @property
    def cache_bytes(self) -> int:
        """Of one element of the KV cache."""
        return DTYPE_BYTES[self.cache_dtype]

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
            parts.extend([self.kv_dtype] if self.kv_dtype else [])
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
