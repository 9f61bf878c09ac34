"""What is tuned by default: the kernels a model needs and the sizes each is tuned at. Knows no plan and no timing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

from specattn_codegen.heads import HeadConfig
from specattn_codegen.policy import TopK
from specattn_codegen.processors.arch import Arch
from specattn_codegen.spec import Dtype, KernelSpec, KvDtype, Op, ScoreHeads, ScoreSpec, Workload

DRAFT_LEN = 6
BUDGET = TopK(ratio=0.07)
GPU_SIZES = tuple((batch, kv_len) for batch in (1, 16) for kv_len in (4096, 32768, 131072))
CPU_SIZES = ((1, 4096), (1, 16384))

TUNED_OPS: tuple[Op, ...] = ("verify_attention", "select_kv", "sparse_attention")  # mixed_attention takes their plans

PILLAR_SCORES = ScoreSpec(rows="all", heads="kv_head")  # arXiv 2512.01278
VEGAS_SCORES = ScoreSpec(rows="ends", heads="layer")  # arXiv 2602.07223
REFERENCE_SCORES = ScoreSpec(rows="all", heads="kv_head", normaliser="reference")  # docs/reference-scores.md


def model_specs(
    heads: HeadConfig, *, dtype: Dtype, kv_dtype: KvDtype | None = None, page_size: int, ops: Sequence[Op]
) -> tuple[KernelSpec, ...]:
    """Every kernel the presets launch for one kind of layer, restricted to `ops`.

    A layer with a window already reads few keys: it is drafted and verified densely and needs no scores.
    """

    def attention(op: Op, score: ScoreSpec | None = None, selection: ScoreHeads | None = None) -> KernelSpec:
        return KernelSpec(
            op=op,
            heads=heads,
            dtype=dtype,
            kv_dtype=kv_dtype,
            page_size=page_size,
            score=score,
            selection=selection,
        )

    verify = attention("verify_attention")
    scored = tuple(attention("verify_attention", score) for score in (PILLAR_SCORES, VEGAS_SCORES, REFERENCE_SCORES))
    select = tuple(select_spec(heads, layer_shared=shared) for shared in (False, True))
    sparse = tuple(attention("sparse_attention", selection=selection) for selection in get_args(ScoreHeads))
    wanted = (verify,) if heads.window is not None else (verify, *scored, *select, *sparse)
    return tuple(spec for spec in wanted if spec.op in ops)


def mixed_specs(
    heads: HeadConfig, *, dtype: Dtype, kv_dtype: KvDtype | None = None, page_size: int
) -> list[KernelSpec]:
    """The mixed batches of the presets: scores and selections that go together, and batches without scores."""
    together: tuple[tuple[ScoreSpec | None, ScoreHeads], ...] = (
        (None, "kv_head"),
        (None, "layer"),
        (PILLAR_SCORES, "kv_head"),
        (VEGAS_SCORES, "layer"),
        (REFERENCE_SCORES, "kv_head"),
    )
    return [
        KernelSpec(
            op="mixed_attention",
            heads=heads,
            dtype=dtype,
            kv_dtype=kv_dtype,
            page_size=page_size,
            score=score,
            selection=selection,
        )
        for score, selection in together
        if heads.window is None
    ]


def select_spec(heads: HeadConfig, *, layer_shared: bool) -> KernelSpec:
    """select_kv reads float32 scores and no cache, so neither the cache's dtype nor its pages matter."""
    return KernelSpec(op="select_kv", heads=heads, selection="layer" if layer_shared else "kv_head")


def default_workloads(spec: KernelSpec, arch: Arch) -> tuple[Workload, ...]:
    """Sizes tuned for one kernel: a verification of DRAFT_LEN drafts, single rows for drafts and dense decoding.

    On the CPU every workload is timed on its own, so there are few and small ones; for a GPU that is absent a further
    workload costs one evaluation of the cost model.
    """
    pairs = GPU_SIZES if arch.is_gpu else CPU_SIZES
    verify_rows = DRAFT_LEN + 1
    if spec.op == "verify_attention":
        rows = (1, verify_rows) if spec.score is None else (verify_rows,)
        return tuple(Workload(batch=b, q_len=q_len, kv_len=n) for q_len in rows for b, n in pairs)
    q_len = verify_rows if spec.op == "select_kv" else 1
    return tuple(Workload(batch=b, q_len=q_len, kv_len=n, budget=BUDGET.budget(n - q_len)) for b, n in pairs)
