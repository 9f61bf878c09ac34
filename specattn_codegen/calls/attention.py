"""From a user's tensors to a checked attention call: every rule of the shared contract, once."""

from __future__ import annotations

import functools
import itertools
from typing import NamedTuple

import torch

from specattn_codegen.calls.outputs import allocate_outputs, check_outputs, has_histogram, score_shape_of
from specattn_codegen.calls.tensors import require, require_slots
from specattn_codegen.errors import SpecError
from specattn_codegen.heads import HeadConfig
from specattn_codegen.kernel import AttentionCall
from specattn_codegen.proof.problems import TORCH_DTYPES
from specattn_codegen.results import Selection, SparseOutput, VerifyOutput
from specattn_codegen.spec import KernelSpec, require_type

MAX_ROWS = 65535  # of one request; the smallest limit of a launch grid's axes


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
        require(mode, "mode", (batch,), torch.int32, q.device)
    score_shape = score_shape_of(spec, batch, max_kv, page_size)
    if out is None:
        out = allocate_outputs(spec, q, score_shape)
    else:
        check_outputs(spec, q, score_shape, out)
    scored = out if isinstance(out, VerifyOutput) and spec.score else None
    call = AttentionCall(
        **inputs._asdict(),
        max_q=max_q,
        max_kv=max_kv,
        sinks=sinks,
        out=out.out,
        lse=out.lse,
        scores=scored.scores if scored else None,
        histogram=scored.histogram if scored and has_histogram(spec) else None,
        lse_ref=lse_ref,
        k_scale=cache_scale(spec, "k_scale", k_scale, q.device),
        v_scale=cache_scale(spec, "v_scale", v_scale, q.device),
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


def _check_inputs(
    spec: KernelSpec, page_size: int, inputs: AttentionInputs, sinks: torch.Tensor | None
) -> AttentionInputs:
    """The inputs, an 8-bit cache that came as bytes in its own dtype."""
    require_type("kv_lens", inputs.kv_lens, torch.Tensor, "a torch.Tensor")
    heads, device, cache_dtype = spec.heads, inputs.q.device, TORCH_DTYPES[spec.cache_dtype]
    batch = inputs.kv_lens.shape[0] if inputs.kv_lens.dim() else 0
    require(inputs.q, "q", (None, heads.num_q_heads, heads.head_dim), TORCH_DTYPES[spec.dtype], device)
    if spec.is_float8 and inputs.k_cache.dtype == inputs.v_cache.dtype == torch.uint8:
        inputs = inputs._replace(k_cache=inputs.k_cache.view(cache_dtype), v_cache=inputs.v_cache.view(cache_dtype))
    require(inputs.k_cache, "k_cache", (None, page_size, heads.num_kv_heads, heads.head_dim), cache_dtype, device)
    pages = inputs.k_cache.shape[0]
    require(inputs.v_cache, "v_cache", (pages, page_size, heads.num_kv_heads, heads.v_head_dim), cache_dtype, device)
    require(inputs.kv_lens, "kv_lens", (None,), torch.int32, device)
    require(inputs.page_table, "page_table", (batch, None), torch.int32, device)
    require(inputs.cu_q, "cu_q", (batch + 1,), torch.int32, device)
    if heads.sinks != (sinks is not None):
        fix = "pass sinks" if heads.sinks else "leave sinks out"
        raise SpecError(f"sinks: this HeadConfig has sinks={heads.sinks}; {fix}")
    if sinks is not None:
        require(sinks, "sinks", (heads.num_q_heads,), torch.float32, device)
    return inputs


def _check_reference(spec: KernelSpec, q: torch.Tensor, lse_ref: torch.Tensor | None) -> None:
    wanted = spec.score is not None and spec.score.normaliser == "reference"
    if wanted != (lse_ref is not None):
        fix = "pass lse_ref [total_q, Hq]" if wanted else "leave it out, or ask for normaliser='reference'"
        raise SpecError(f"lse_ref: scores are {'' if wanted else 'not '}normalised by a reference here; {fix}")
    if lse_ref is not None:
        require(lse_ref, "lse_ref", (q.shape[0], spec.heads.num_q_heads), torch.float32, q.device)
        if not lse_ref.is_contiguous():
            raise SpecError(f"lse_ref has strides {lse_ref.stride()}: must be contiguous")


@functools.cache
def _unit_scale(device: torch.device) -> torch.Tensor:
    return torch.ones(1, dtype=torch.float32, device=device)


def cache_scale(spec: KernelSpec, name: str, scale: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
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
    require(selection.indices, "selection.indices", (batch, None, None), torch.int32, device)
    require(selection.counts, "selection.counts", (batch, rows), torch.int32, device)
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
    require(tail_start, "tail_start", (batch,), torch.int32, device)


def _check_slots(selection: Selection, slots: torch.Tensor, page_size: int) -> None:
    indices = selection.indices
    require_slots(slots, "selection.slots", indices)
    if slots.stride() != indices.stride():
        raise SpecError(
            f"selection.slots has strides {slots.stride()}: must be those of selection.indices, {indices.stride()}; "
            "cut both alike"
        )
    if page_size % selection.block:
        raise SpecError(
            f"page_size={page_size}, block={selection.block}: slots need a page of a whole number of blocks"
        )


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
