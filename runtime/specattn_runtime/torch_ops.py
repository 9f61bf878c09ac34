"""The operations as torch operators (`torch.ops.specattn.*`), opaque to torch.compile, with fake implementations.

They are functional: every result is a new tensor, and score columns past a request's prefix are 0. What the heads
cannot be read from (scale, softcap, window) comes as numbers: softcap 0 and window 0 mean none, max_kv -1 means what
the page table holds.
"""

from __future__ import annotations

import functools

import torch

from specattn_codegen import build, space
from specattn_codegen.calls import select_call
from specattn_codegen.errors import SpecError
from specattn_codegen.heads import HeadConfig
from specattn_codegen.kernel import Kernel
from specattn_codegen.policy import PPM, Policy, Threshold, TopK, TopP, selection_width
from specattn_codegen.processors import cpu_info, gpu_detect
from specattn_codegen.render import render
from specattn_codegen.results import Selection, VerifyOutput
from specattn_codegen.spec import HISTOGRAM_BINS, KernelSpec, ScoreSpec
from specattn_runtime.dispatch import Kernels, load_kernels


@functools.cache
def _kernels(
    heads: HeadConfig, device: torch.device, dtype: torch.dtype, kv_dtype: torch.dtype, page_size: int
) -> Kernels:
    return load_kernels(heads, device=device, dtype=dtype, kv_dtype=kv_dtype, page_size=page_size, keep_scratch=False)


def _kernels_of(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    sinks: torch.Tensor | None,
    scale: float,
    softcap: float,
    window: int,
) -> Kernels:
    if q.dim() != 3 or k_cache.dim() != 4 or v_cache.dim() != 4:
        raise SpecError(
            f"q {tuple(q.shape)}, k_cache {tuple(k_cache.shape)}, v_cache {tuple(v_cache.shape)}: must be "
            "[total_q, Hq, D], [pages, page_size, Hkv, D] and [pages, page_size, Hkv, Dv]"
        )
    heads = HeadConfig(
        num_q_heads=q.shape[1],
        num_kv_heads=k_cache.shape[2],
        head_dim=q.shape[2],
        v_head_dim=v_cache.shape[3],
        scale=scale,
        softcap=softcap or None,
        window=window or None,
        sinks=sinks is not None,
    )
    return _kernels(heads, q.device, q.dtype, k_cache.dtype, k_cache.shape[1])


def _score_spec(
    rows: str, heads: str, value: str, normaliser: str, granularity: str, histogram: bool
) -> ScoreSpec | None:
    """None where rows is "". Raises SpecError for a name that ScoreSpec does not know."""
    if not rows:
        return None
    return ScoreSpec(
        rows=rows,  # pyright: ignore[reportArgumentType]
        heads=heads,  # pyright: ignore[reportArgumentType]
        value=value,  # pyright: ignore[reportArgumentType]
        normaliser=normaliser,  # pyright: ignore[reportArgumentType]
        granularity=granularity,  # pyright: ignore[reportArgumentType]
        histogram=histogram,
    )


def _new_attention(q: torch.Tensor, v_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse."""
    return (
        q.new_empty(q.shape[0], q.shape[1], v_cache.shape[3]),
        q.new_empty(q.shape[0], q.shape[1], dtype=torch.float32),
    )


def _new_scores(
    score: ScoreSpec | None, q: torch.Tensor, k_cache: torch.Tensor, page_table: torch.Tensor, max_kv: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Zeroed scores and histogram; each of 0 elements where the operator gives none."""
    if score is None:
        return q.new_zeros(0, dtype=torch.float32), q.new_zeros(0, dtype=torch.int32)
    page_size = k_cache.shape[1]
    columns = score.columns(page_table.shape[1] * page_size if max_kv < 0 else max_kv, page_size)
    rows = (page_table.shape[0], 1 if score.heads == "layer" else k_cache.shape[2])
    return (
        q.new_zeros((*rows, columns), dtype=torch.float32),
        q.new_zeros((*rows, HISTOGRAM_BINS) if score.histogram else 0, dtype=torch.int32),
    )


@torch.library.custom_op("specattn::verify_attention", mutates_args=())
def verify_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    kv_lens: torch.Tensor,
    cu_q: torch.Tensor,
    max_q: int,
    scale: float,
    max_kv: int = -1,
    softcap: float = 0.0,
    window: int = 0,
    sinks: torch.Tensor | None = None,
    score_rows: str = "",
    score_heads: str = "kv_head",
    score_value: str = "weight",
    score_normaliser: str = "exact",
    score_granularity: str = "token",
    score_histogram: bool = False,
    lse_ref: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns out, lse, scores and histogram. Scores are empty where score_rows is "", and so is a histogram that is
    not asked for."""
    kernels = _kernels_of(q, k_cache, v_cache, sinks, scale, softcap, window)
    named = (score_rows, score_heads, score_value, score_normaliser, score_granularity, score_histogram)
    score = _score_spec(*named)
    results = *_new_attention(q, v_cache), *_new_scores(score, q, k_cache, page_table, max_kv)
    kernels.verify_attention(
        *(q, k_cache, v_cache, page_table, kv_lens, cu_q),
        max_q=max_q,
        max_kv=None if max_kv < 0 else max_kv,
        score=score,
        lse_ref=lse_ref,
        sinks=sinks,
        k_scale=k_scale,
        v_scale=v_scale,
        out=VerifyOutput(*results),
    )
    return results


@verify_attention.register_fake
def _(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    kv_lens: torch.Tensor,
    cu_q: torch.Tensor,
    max_q: int,
    scale: float,
    max_kv: int = -1,
    softcap: float = 0.0,
    window: int = 0,
    sinks: torch.Tensor | None = None,
    score_rows: str = "",
    score_heads: str = "kv_head",
    score_value: str = "weight",
    score_normaliser: str = "exact",
    score_granularity: str = "token",
    score_histogram: bool = False,
    lse_ref: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    named = (score_rows, score_heads, score_value, score_normaliser, score_granularity, score_histogram)
    return *_new_attention(q, v_cache), *_new_scores(_score_spec(*named), q, k_cache, page_table, max_kv)


@torch.library.custom_op("specattn::sparse_attention", mutates_args=())
def sparse_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    kv_lens: torch.Tensor,
    cu_q: torch.Tensor,
    indices: torch.Tensor,
    counts: torch.Tensor,
    tail_start: torch.Tensor,
    max_q: int,
    scale: float,
    max_kv: int = -1,
    softcap: float = 0.0,
    window: int = 0,
    sinks: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    block: int = 1,
    slots: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns out and lse. slots, where given, say where the cache holds the selected blocks."""
    kernels = _kernels_of(q, k_cache, v_cache, sinks, scale, softcap, window)
    result = kernels.sparse_attention(
        *(q, k_cache, v_cache, page_table, kv_lens, cu_q),
        Selection(indices, counts, block, slots),
        tail_start,
        max_q=max_q,
        max_kv=None if max_kv < 0 else max_kv,
        sinks=sinks,
        k_scale=k_scale,
        v_scale=v_scale,
    )
    return result.out, result.lse


@sparse_attention.register_fake
def _(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    kv_lens: torch.Tensor,
    cu_q: torch.Tensor,
    indices: torch.Tensor,
    counts: torch.Tensor,
    tail_start: torch.Tensor,
    max_q: int,
    scale: float,
    max_kv: int = -1,
    softcap: float = 0.0,
    window: int = 0,
    sinks: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    block: int = 1,
    slots: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    return _new_attention(q, v_cache)


@torch.library.custom_op("specattn::mixed_attention", mutates_args=())
def mixed_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    kv_lens: torch.Tensor,
    cu_q: torch.Tensor,
    indices: torch.Tensor,
    counts: torch.Tensor,
    tail_start: torch.Tensor,
    mode: torch.Tensor,
    max_q: int,
    scale: float,
    max_kv: int = -1,
    softcap: float = 0.0,
    window: int = 0,
    sinks: torch.Tensor | None = None,
    score_rows: str = "",
    score_heads: str = "kv_head",
    score_value: str = "weight",
    score_normaliser: str = "exact",
    score_granularity: str = "token",
    score_histogram: bool = False,
    lse_ref: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    block: int = 1,
    slots: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns out, lse, scores and histogram, as verify_attention does for requests of mode 0; one of mode 1 drafts, as
    in sparse_attention, and its scores and histogram are 0."""
    kernels = _kernels_of(q, k_cache, v_cache, sinks, scale, softcap, window)
    named = (score_rows, score_heads, score_value, score_normaliser, score_granularity, score_histogram)
    score = _score_spec(*named)
    results = *_new_attention(q, v_cache), *_new_scores(score, q, k_cache, page_table, max_kv)
    kernels.mixed_attention(
        *(q, k_cache, v_cache, page_table, kv_lens, cu_q),
        Selection(indices, counts, block, slots),
        tail_start,
        mode,
        max_q=max_q,
        max_kv=None if max_kv < 0 else max_kv,
        score=score,
        lse_ref=lse_ref,
        sinks=sinks,
        k_scale=k_scale,
        v_scale=v_scale,
        out=VerifyOutput(*results),
    )
    return results


@mixed_attention.register_fake
def _(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    page_table: torch.Tensor,
    kv_lens: torch.Tensor,
    cu_q: torch.Tensor,
    indices: torch.Tensor,
    counts: torch.Tensor,
    tail_start: torch.Tensor,
    mode: torch.Tensor,
    max_q: int,
    scale: float,
    max_kv: int = -1,
    softcap: float = 0.0,
    window: int = 0,
    sinks: torch.Tensor | None = None,
    score_rows: str = "",
    score_heads: str = "kv_head",
    score_value: str = "weight",
    score_normaliser: str = "exact",
    score_granularity: str = "token",
    score_histogram: bool = False,
    lse_ref: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    block: int = 1,
    slots: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    named = (score_rows, score_heads, score_value, score_normaliser, score_granularity, score_histogram)
    return *_new_attention(q, v_cache), *_new_scores(_score_spec(*named), q, k_cache, page_table, max_kv)


@functools.cache
def _selector(device_type: str) -> Kernel:
    """Scores carry no heads to look a pack up by, so the operator runs the safe default plan."""
    spec = KernelSpec(op="select_kv", heads=HeadConfig(num_q_heads=1, num_kv_heads=1, head_dim=1), selection="layer")
    arch = cpu_info.detect(measure=False) if device_type == "cpu" else gpu_detect.local()
    plan = space.default_plan(spec, arch, space.backends_for(arch)[0])
    return build.load(render(spec, plan, build.target_for(plan, arch)))


def _policy(
    k: int | None,
    ratio_ppm: int | None,
    least: int,
    most: int | None,
    p: float | None,
    bisection_steps: int | None,
    threshold: float | None,
) -> Policy:
    given = {"k": k, "ratio_ppm": ratio_ppm, "p": p, "threshold": threshold}
    if sum(value is not None for value in given.values()) != 1:
        raise SpecError(f"{given}: give exactly one of k, ratio_ppm, p and threshold")
    if p is not None:
        return TopP(p, min=least, max=most, bisection_steps=bisection_steps)
    if threshold is not None:
        return Threshold(threshold)
    return TopK(k=k, ratio=None if ratio_ppm is None else ratio_ppm / PPM, min=least, max=most)


@torch.library.custom_op("specattn::select_kv", mutates_args=())
def select_kv(
    scores: torch.Tensor,
    prefix_lens: torch.Tensor,
    k: int | None = None,
    ratio_ppm: int | None = None,
    min_keys: int = 0,
    max_keys: int | None = None,
    p: float | None = None,
    bisection_steps: int | None = None,
    threshold: float | None = None,
    sink: int = 0,
    recent: int = 0,
    block: int = 1,
    union: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns indices [B, S, K] and counts [B, S], with a leading layer axis if scores [B, S * union, N] have one.

    Exactly one of k, ratio_ppm, p and threshold names the policy; min_keys and max_keys go with ratio_ppm and p.
    """
    policy = _policy(k, ratio_ppm, min_keys, max_keys, p, bisection_steps, threshold)
    call = select_call(scores, prefix_lens, policy, sink=sink, recent=recent, block=block, union=union)
    kernel = _selector(scores.device.type)
    kernel.launch(call, torch.empty(kernel.workspace_bytes(call), dtype=torch.uint8, device=scores.device))
    return call.indices, call.counts


@select_kv.register_fake
def _(
    scores: torch.Tensor,
    prefix_lens: torch.Tensor,
    k: int | None = None,
    ratio_ppm: int | None = None,
    min_keys: int = 0,
    max_keys: int | None = None,
    p: float | None = None,
    bisection_steps: int | None = None,
    threshold: float | None = None,
    sink: int = 0,
    recent: int = 0,
    block: int = 1,
    union: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    policy = _policy(k, ratio_ppm, min_keys, max_keys, p, bisection_steps, threshold)
    width = selection_width(policy, scores.shape[-1] * block, sink, recent, block, union)
    rows = (*scores.shape[:-2], scores.shape[-2] // union)
    return (
        torch.empty(*rows, width, dtype=torch.int32, device=scores.device),
        torch.empty(*rows, dtype=torch.int32, device=scores.device),
    )
