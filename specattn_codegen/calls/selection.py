"""From scores and a policy to a checked select_kv call."""

from __future__ import annotations

import torch

from specattn_codegen.calls.tensors import SLOT_DTYPES, require, require_contiguous, require_slots
from specattn_codegen.errors import SpecError
from specattn_codegen.kernel import SelectCall
from specattn_codegen.policy import MAX_KEYS, Policy, Threshold, TopK, TopP, selection_width
from specattn_codegen.results import Selection
from specattn_codegen.spec import HISTOGRAM_BINS, require_type


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
    require_type("policy", policy, (TopK, TopP, Threshold), "TopK, TopP or Threshold, as TopK(k=2048)")
    layers = (None,) * (scores.dim() - 3)
    require(scores, "scores", (*layers, None, None, None), torch.float32, scores.device)
    *leading, score_rows, columns = scores.shape
    batch = leading[-1]
    require(prefix_lens, "prefix_lens", (batch,), torch.int32, scores.device)
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
    require(page_table, "page_table", (batch, None), torch.int32, device)
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
    require(out.indices, "out.indices", (*rows, None), torch.int32, device)
    require(out.counts, "out.counts", tuple(rows), torch.int32, device)
    require_contiguous(indices=out.indices, counts=out.counts, slots=out.slots)
    if out.indices.shape[-1] < width:
        raise SpecError(f"out.indices has {out.indices.shape[-1]} columns: a row of this call may select {width}")
    if out.block != block:
        raise SpecError(f"out.block={out.block}: this call selects blocks of {block} keys")
    if wants_slots != (out.slots is not None):
        raise SpecError("out.slots: give a tensor for them exactly where the call has a page_table")
    if out.slots is not None:
        require_slots(out.slots, "out.slots", out.indices)


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
    require(histogram, "histogram", (*scores.shape[:-1], HISTOGRAM_BINS), torch.int32, scores.device)
    if not histogram.is_contiguous():
        raise SpecError(f"histogram has strides {histogram.stride()}: must be contiguous, as verification leaves it")
    return histogram
