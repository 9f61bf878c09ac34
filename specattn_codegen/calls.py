"""From a user's tensors to a checked call: every shape, dtype, device and stride rule of the shared contract, once."""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import torch

from specattn_codegen.errors import SpecError
from specattn_codegen.heads import HeadConfig
from specattn_codegen.kernel import AttentionCall, SelectCall
from specattn_codegen.policy import MAX_KEYS, Policy, Threshold, TopK, selection_width
from specattn_codegen.problems import TORCH_DTYPES, AttentionProblem
from specattn_codegen.results import Selection, SparseOutput, VerifyOutput
from specattn_codegen.spec import HISTOGRAM_BINS, KernelSpec

Shape = tuple[int | None, ...]
MAX_ROWS = 65535  # of one request; the smallest limit of a launch grid's axes
SLOT_DTYPES = (torch.int32, torch.int64)


def _require(tensor: torch.Tensor, name: str, shape: Shape, dtype: torch.dtype, device: torch.device) -> None:
    fits = tensor.dim() == len(shape) and all(
        want is None or want == have for want, have in zip(shape, tensor.shape, strict=True)
    )
    if not fits:
        want = ", ".join("any" if size is None else str(size) for size in shape)
        raise SpecError(f"{name} has shape {tuple(tensor.shape)}: must be [{want}]")
    if tensor.dtype != dtype:
        raise SpecError(f"{name} is {tensor.dtype}: must be {dtype}; convert it with .to({dtype})")
    if tensor.device != device:
        raise SpecError(f"{name} is on {tensor.device}: must be on {device} like q; move it with .to({str(device)!r})")
    if tensor.dim() and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise SpecError(f"{name} has last stride {tensor.stride(-1)}: must be 1; call .contiguous()")


def _check_host_lengths(call: AttentionCall) -> None:
    """Lengths in host memory cost nothing to read, and a wrong one would make a CPU kernel run past a buffer."""
    starts, lengths = call.cu_q.tolist(), call.kv_lens.tolist()
    rows = [end - start for start, end in itertools.pairwise(starts)]
    if starts[0] != 0 or min(rows, default=0) < 0 or starts[-1] != call.q.shape[0]:
        raise SpecError(f"cu_q={starts}: must start at 0, never fall and end at q's {call.q.shape[0]} rows")
    if max(rows, default=0) > call.max_q:
        raise SpecError(f"max_q={call.max_q}: a request has {max(rows)} rows; pass max_q={max(rows)} or more")
    if max(lengths, default=0) > call.max_kv:
        raise SpecError(f"max_kv={call.max_kv}: a request has {max(lengths)} keys; pass a max_kv of at least that")


class AttentionInputs(NamedTuple):
    """The tensors every attention call starts with.

    q [total_q, Hq, D]; k_cache [num_pages, page_size, Hkv, D] and v_cache [num_pages, page_size, Hkv, Dv] with any
    strides but a unit last one; page_table [B, max_pages], kv_lens [B] and cu_q [B + 1], all int32.
    """

    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    page_table: torch.Tensor
    kv_lens: torch.Tensor
    cu_q: torch.Tensor


def attention_call(
    spec: KernelSpec,
    page_size: int,
    inputs: AttentionInputs,
    *,
    max_q: int,
    max_kv: int | None = None,
    sinks: torch.Tensor | None = None,
    lse_ref: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    out: VerifyOutput | SparseOutput | None = None,
    selection: Selection | None = None,
    tail_start: torch.Tensor | None = None,
    mode: torch.Tensor | None = None,
) -> AttentionCall:
    """Checks a call against its spec and allocates the outputs that `out` does not give. Raises SpecError."""
    inputs = _check_inputs(spec, page_size, inputs, sinks)
    _check_reference(spec, inputs.q, lse_ref)
    q, batch = inputs.q, inputs.kv_lens.shape[0]
    capacity = inputs.page_table.shape[1] * page_size
    max_kv = capacity if max_kv is None else max_kv
    if not 1 <= max_q <= MAX_ROWS or not 0 <= max_kv <= capacity:
        raise SpecError(
            f"max_q={max_q}, max_kv={max_kv}: needs 1 <= max_q <= {MAX_ROWS} and 0 <= max_kv <= {capacity}, "
            "the keys the page table holds"
        )
    if selection is not None:
        _check_selection(spec.heads, selection, tail_start, batch, page_size, q.device)
    if mode is not None:
        _require(mode, "mode", (batch,), torch.int32, q.device)
    score_shape = score_shape_of(spec, batch, max_kv, page_size)
    if out is None:
        out = _allocate_outputs(spec, q, score_shape)
    else:
        _check_outputs(spec, q, score_shape, out)
    call = AttentionCall(
        **inputs._asdict(),
        max_q=max_q,
        max_kv=max_kv,
        sinks=sinks,
        out=out.out,
        lse=out.lse,
        scores=out.scores if isinstance(out, VerifyOutput) else None,
        histogram=out.histogram if isinstance(out, VerifyOutput) else None,
        lse_ref=lse_ref,
        k_scale=_cache_scale(spec, "k_scale", k_scale, q.device),
        v_scale=_cache_scale(spec, "v_scale", v_scale, q.device),
        indices=selection.indices if selection else None,
        counts=selection.counts if selection else None,
        block=selection.block if selection else 1,
        slots=selection.slots if selection else None,
        mode=mode,
        tail_start=tail_start,
    )
    if q.device.type == "cpu":
        _check_host_lengths(call)
    return call


def score_shape_of(spec: KernelSpec, batch: int, max_kv: int, page_size: int) -> tuple[int, int, int] | None:
    """[B, S, columns] of the scores a spec asks for."""
    return (batch, spec.score_rows, spec.score.columns(max_kv, page_size)) if spec.score else None


def _check_inputs(
    spec: KernelSpec, page_size: int, inputs: AttentionInputs, sinks: torch.Tensor | None
) -> AttentionInputs:
    """The inputs, an 8-bit cache that came as bytes in its own dtype."""
    heads, device, cache_dtype = spec.heads, inputs.q.device, TORCH_DTYPES[spec.cache_dtype]
    batch = inputs.kv_lens.shape[0] if inputs.kv_lens.dim() else 0
    _require(inputs.q, "q", (None, heads.num_q_heads, heads.head_dim), TORCH_DTYPES[spec.dtype], device)
    if spec.is_float8 and inputs.k_cache.dtype == inputs.v_cache.dtype == torch.uint8:
        inputs = inputs._replace(k_cache=inputs.k_cache.view(cache_dtype), v_cache=inputs.v_cache.view(cache_dtype))
    _require(inputs.k_cache, "k_cache", (None, page_size, heads.num_kv_heads, heads.head_dim), cache_dtype, device)
    pages = inputs.k_cache.shape[0]
    _require(inputs.v_cache, "v_cache", (pages, page_size, heads.num_kv_heads, heads.v_head_dim), cache_dtype, device)
    _require(inputs.kv_lens, "kv_lens", (None,), torch.int32, device)
    _require(inputs.page_table, "page_table", (batch, None), torch.int32, device)
    _require(inputs.cu_q, "cu_q", (batch + 1,), torch.int32, device)
    if heads.sinks != (sinks is not None):
        fix = "pass sinks" if heads.sinks else "leave sinks out"
        raise SpecError(f"sinks: this HeadConfig has sinks={heads.sinks}; {fix}")
    if sinks is not None:
        _require(sinks, "sinks", (heads.num_q_heads,), torch.float32, device)
    return inputs


def _check_reference(spec: KernelSpec, q: torch.Tensor, lse_ref: torch.Tensor | None) -> None:
    wanted = spec.score is not None and spec.score.normaliser == "reference"
    if wanted != (lse_ref is not None):
        fix = "pass lse_ref [total_q, Hq]" if wanted else "leave it out, or ask for normaliser='reference'"
        raise SpecError(f"lse_ref: scores are {'' if wanted else 'not '}normalised by a reference here; {fix}")
    if lse_ref is not None:
        _require(lse_ref, "lse_ref", (q.shape[0], spec.heads.num_q_heads), torch.float32, q.device)
        if not lse_ref.is_contiguous():
            raise SpecError(f"lse_ref has strides {lse_ref.stride()}: must be contiguous")


@functools.cache
def _unit_scale(device: torch.device) -> torch.Tensor:
    return torch.ones(1, dtype=torch.float32, device=device)


def _cache_scale(spec: KernelSpec, name: str, scale: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    """A scale [Hkv] of an 8-bit cache, expanded from one element where it is per tensor; 1 where none is given."""
    if not spec.is_float8:
        if scale is not None:
            raise SpecError(f"{name}: a {spec.dtype} cache has no scale; leave it out, or fold it into the weights")
        return None
    heads = spec.heads.num_kv_heads
    given = _unit_scale(device) if scale is None else scale
    if given.dtype != torch.float32 or given.device != device or given.numel() not in (1, heads) or given.dim() > 1:
        raise SpecError(
            f"{name} is {given.dtype} {tuple(given.shape)} on {given.device}: must be torch.float32 on {device}, "
            f"of 1 element or one for each of {heads} KV heads"
        )
    return given.view(-1).expand(heads)


def _check_selection(
    heads: HeadConfig,
    selection: Selection,
    tail_start: torch.Tensor | None,
    batch: int,
    page_size: int,
    device: torch.device,
) -> None:
    rows = selection.indices.shape[1] if selection.indices.dim() == 3 else None
    _require(selection.indices, "selection.indices", (batch, None, None), torch.int32, device)
    _require(selection.counts, "selection.counts", (batch, rows), torch.int32, device)
    if rows not in (1, heads.num_kv_heads):
        raise SpecError(
            f"selection.indices has {rows} rows per request: must be 1 (one selection for the layer) "
            f"or {heads.num_kv_heads} (one per KV head)"
        )
    if not selection.counts.is_contiguous():
        raise SpecError(f"selection.counts has strides {selection.counts.stride()}: must be contiguous")
    if selection.block < 1:
        raise SpecError(f"selection.block={selection.block}: must be at least 1 key per index")
    if selection.slots is not None:
        _check_slots(selection, selection.slots, page_size)
    if tail_start is None:
        raise SpecError("tail_start: a selection needs the position at which the dense tail begins")
    _require(tail_start, "tail_start", (batch,), torch.int32, device)


def _check_slots(selection: Selection, slots: torch.Tensor, page_size: int) -> None:
    indices = selection.indices
    _require_slots(slots, "selection.slots", indices)
    if slots.stride() != indices.stride():
        raise SpecError(
            f"selection.slots has strides {slots.stride()}: must be those of selection.indices, {indices.stride()}; "
            "cut both alike"
        )
    if page_size % selection.block:
        raise SpecError(
            f"page_size={page_size}, block={selection.block}: slots need a page of a whole number of blocks"
        )


ScoreShape = tuple[int, int, int]


def _has_histogram(spec: KernelSpec) -> bool:
    return spec.score is not None and spec.score.histogram


def _allocate_outputs(spec: KernelSpec, q: torch.Tensor, score_shape: ScoreShape | None) -> VerifyOutput:
    heads = spec.heads
    return VerifyOutput(
        q.new_empty(q.shape[0], heads.num_q_heads, heads.v_head_dim),
        q.new_empty(q.shape[0], heads.num_q_heads, dtype=torch.float32),
        q.new_empty(score_shape, dtype=torch.float32) if score_shape else None,
        q.new_empty((*score_shape[:2], HISTOGRAM_BINS), dtype=torch.int32)
        if score_shape and _has_histogram(spec)
        else None,
    )


def _check_outputs(
    spec: KernelSpec, q: torch.Tensor, score_shape: ScoreShape | None, out: VerifyOutput | SparseOutput
) -> None:
    heads = spec.heads
    _require(out.out, "out.out", (q.shape[0], heads.num_q_heads, heads.v_head_dim), q.dtype, q.device)
    _require(out.lse, "out.lse", (q.shape[0], heads.num_q_heads), torch.float32, q.device)
    if not out.lse.is_contiguous():
        raise SpecError(f"out.lse has strides {out.lse.stride()}: must be contiguous")
    if score_shape:
        if not isinstance(out, VerifyOutput) or out.scores is None:
            raise SpecError("out.scores is None: this call asks for scores; give a tensor for them or leave out= out")
        _require(out.scores, "out.scores", score_shape, torch.float32, q.device)
        if _has_histogram(spec):
            if out.histogram is None:
                raise SpecError("out.histogram is None: this call asks for one; give a tensor or leave out= out")
            _require(out.histogram, "out.histogram", (*score_shape[:2], HISTOGRAM_BINS), torch.int32, q.device)
            if not out.histogram.is_contiguous():
                raise SpecError(f"out.histogram has strides {out.histogram.stride()}: must be contiguous")


def select_call(
    scores: torch.Tensor,
    prefix_lens: torch.Tensor,
    policy: Policy,
    *,
    sink: int = 0,
    recent: int = 0,
    block: int = 1,
    histogram: torch.Tensor | None = None,
    page_table: torch.Tensor | None = None,
    page_size: int = 1,
    slot_dtype: torch.dtype = torch.int32,
    union: int = 1,
    out: Selection | None = None,
) -> SelectCall:
    """Checks a select_kv call and allocates what `out` does not give. Raises SpecError.

    The shapes are those of SelectCall; a page_table asks for slots of `slot_dtype`, int32 or int64.
    """
    layers = (None,) * (scores.dim() - 3)
    _require(scores, "scores", (*layers, None, None, None), torch.float32, scores.device)
    *leading, score_rows, columns = scores.shape
    batch = leading[-1]
    _require(prefix_lens, "prefix_lens", (batch,), torch.int32, scores.device)
    if sink < 0 or recent < 0 or block < 1:
        raise SpecError(f"sink={sink}, recent={recent}, block={block}: must be at least 0, 0 and 1 keys")
    if scores.dim() > 4 or columns * block >= MAX_KEYS:
        raise SpecError(f"scores {tuple(scores.shape)} of {block} keys a column: at most 4 axes and {MAX_KEYS} keys")
    sink, recent = min(sink, columns * block), min(recent, columns * block)
    _check_page_table(page_table, page_size, batch, block, scores.device)
    if union < 1 or score_rows % union:
        raise SpecError(f"union={union}: must be at least 1 and divide the {score_rows} score rows of a request")
    width = selection_width(policy, columns * block, sink, recent, block, union)
    shape = (*leading, score_rows // union, width)
    if out is None:
        out = _allocate_selection(shape, block, slot_dtype if page_table is not None else None, scores.device)
    else:
        _check_selection_output(shape, block, page_table is not None, out, scores.device)
    return SelectCall(
        scores=scores,
        prefix_lens=prefix_lens,
        policy=policy,
        sink=sink,
        recent=recent,
        indices=out.indices,
        counts=out.counts,
        block=block,
        thresholds=_thresholds(policy, scores),
        histogram=_checked_histogram(policy, scores, histogram),
        page_table=page_table,
        page_size=page_size,
        slots=out.slots,
        union=union,
    )


def _check_page_table(
    page_table: torch.Tensor | None, page_size: int, batch: int, block: int, device: torch.device
) -> None:
    if page_table is None:
        return
    _require(page_table, "page_table", (batch, None), torch.int32, device)
    if page_size < 1 or page_size % block:
        raise SpecError(f"page_size={page_size}, block={block}: slots need a page of a whole number of blocks")


def _allocate_selection(
    shape: tuple[int, ...], block: int, slot_dtype: torch.dtype | None, device: torch.device
) -> Selection:
    if slot_dtype not in (None, *SLOT_DTYPES):
        raise SpecError(f"slot_dtype={slot_dtype}: must be torch.int32 or torch.int64")
    return Selection(
        torch.empty(shape, dtype=torch.int32, device=device),
        torch.empty(shape[:-1], dtype=torch.int32, device=device),
        block,
        None if slot_dtype is None else torch.empty(shape, dtype=slot_dtype, device=device),
    )


def _check_selection_output(
    shape: tuple[int, ...], block: int, wants_slots: bool, out: Selection, device: torch.device
) -> None:
    *rows, width = shape
    _require(out.indices, "out.indices", (*rows, None), torch.int32, device)
    _require(out.counts, "out.counts", tuple(rows), torch.int32, device)
    _require_contiguous(indices=out.indices, counts=out.counts, slots=out.slots)
    if out.indices.shape[-1] < width:
        raise SpecError(f"out.indices has {out.indices.shape[-1]} columns: a row of this call may select {width}")
    if out.block != block:
        raise SpecError(f"out.block={out.block}: this call selects blocks of {block} keys")
    if wants_slots != (out.slots is not None):
        raise SpecError("out.slots: give a tensor for them exactly where the call has a page_table")
    if out.slots is not None:
        _require_slots(out.slots, "out.slots", out.indices)


def _require_slots(slots: torch.Tensor, name: str, indices: torch.Tensor) -> None:
    if slots.dtype not in SLOT_DTYPES:
        raise SpecError(f"{name} is {slots.dtype}: must be torch.int32 or torch.int64")
    _require(slots, name, tuple(indices.shape), slots.dtype, indices.device)


def _require_contiguous(**outputs: torch.Tensor | None) -> None:
    for name, output in outputs.items():
        if output is not None and not output.is_contiguous():
            raise SpecError(f"out.{name} has strides {output.stride()}: must be contiguous")


def _thresholds(policy: Policy, scores: torch.Tensor) -> torch.Tensor | None:
    """A threshold for each score row where the policy has a tensor of them."""
    if not isinstance(policy, Threshold) or not isinstance(policy.value, torch.Tensor):
        return None
    value, rows = policy.value, scores.shape[:-1]
    if value.dtype != torch.float32 or value.device != scores.device:
        raise SpecError(f"Threshold of {value.dtype} on {value.device}: must be torch.float32 on {scores.device}")
    try:
        return value.expand(rows)
    except RuntimeError as error:
        raise SpecError(f"Threshold of shape {tuple(value.shape)}: must broadcast to the rows {tuple(rows)}") from error


def _checked_histogram(policy: Policy, scores: torch.Tensor, histogram: torch.Tensor | None) -> torch.Tensor | None:
    if histogram is None:
        return None
    if not isinstance(policy, TopK):
        raise SpecError(f"histogram: {type(policy).__name__} has no use for counts of scores; leave it out")
    _require(histogram, "histogram", (*scores.shape[:-1], HISTOGRAM_BINS), torch.int32, scores.device)
    if not histogram.is_contiguous():
        raise SpecError(f"histogram has strides {histogram.stride()}: must be contiguous, as verification leaves it")
    return histogram


def problem_call(spec: KernelSpec, problem: AttentionProblem) -> AttentionCall:
    """The call of a generated problem; its outputs start as NaN, so that an element nobody writes is seen."""
    p, heads = problem, spec.heads
    total_q, batch = p.q.shape[0], p.kv_lens.shape[0]
    nan = float("nan")
    score_shape = score_shape_of(spec, batch, p.max_kv, p.k_cache.shape[1])
    scores = p.q.new_full(score_shape, nan, dtype=torch.float32) if score_shape else None
    histogram = None
    if score_shape and _has_histogram(spec):
        histogram = p.q.new_full((*score_shape[:2], HISTOGRAM_BINS), -1, dtype=torch.int32)
    return AttentionCall(
        q=p.q,
        k_cache=p.k_cache,
        v_cache=p.v_cache,
        page_table=p.page_table,
        kv_lens=p.kv_lens,
        cu_q=p.cu_q,
        max_q=p.max_q,
        max_kv=p.max_kv,
        sinks=p.sinks,
        out=p.q.new_full((total_q, heads.num_q_heads, heads.v_head_dim), nan),
        lse=p.q.new_full((total_q, heads.num_q_heads), nan, dtype=torch.float32),
        scores=scores,
        indices=p.indices,
        counts=p.counts,
        tail_start=p.tail_start if p.indices is not None else None,
        block=p.block,
        slots=p.slots,
        mode=p.mode,
        lse_ref=p.lse_ref,
        histogram=histogram,
        k_scale=_cache_scale(spec, "k_scale", p.k_scale, p.q.device),
        v_scale=_cache_scale(spec, "v_scale", p.v_scale, p.q.device),
    )
