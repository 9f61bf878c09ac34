"""What a round takes at a whole model's shape: a draft step, a verification, a selection, and dense decoding's step."""

from __future__ import annotations

import dataclasses
import functools

import torch

from benchmarks.gpu.journal import Answer
from benchmarks.gpu.rounds import EMITTED, Round, Shape, drawn_llama
from benchmarks.gpu.session import Session, Step, Steps
from benchmarks.gpu.sizes import PAGE_SIZE
from specattn_codegen.spec import ScoreSpec
from specattn_codegen.tuning.outcome import Timing
from specattn_codegen.workloads import DRAFT_LEN
from specattn_runtime.dispatch import load_kernels
from specattn_runtime.model.llama import Llama

MEMORY_SHARE = 0.7  # of what is free once the weights are there, for caches and scores


def steps(session: Session) -> Steps:
    @functools.cache
    def model() -> Llama:
        longest = max(kv_len for _, kv_len in session.sizes.rounds) + EMITTED * (DRAFT_LEN + 1)
        size = session.sizes.model
        return drawn_llama(size, size.num_layers, longest, torch.bfloat16, session.device)

    for batch, kv_len in session.sizes.rounds:
        for name, score in session.sizes.scores.items():
            run = functools.partial(_asked, session, model, batch, kv_len, score)
            yield Step(key=f"rounds/{name}/b{batch}-n{kv_len}", seconds=40, run=run)


def _asked(
    session: Session, model: functools._lru_cache_wrapper[Llama], batch: int, kv_len: int, score: ScoreSpec
) -> Answer:
    return time_parts(session, model(), batch, kv_len, score)


def caches_that_fit(session: Session, batch: int, kv_len: int) -> int:
    """Layers' caches that fit beside the weights, at most one each. Raises MemoryError where not even one does."""
    size = session.sizes.model
    heads, keys = size.heads, batch * (kv_len + EMITTED * (DRAFT_LEN + 1) + PAGE_SIZE)
    cache = 2 * keys * heads.num_kv_heads * (heads.head_dim + heads.v_head_dim)
    scores = 4 * keys * heads.num_kv_heads * size.num_layers
    free = torch.cuda.mem_get_info()[0] if session.arch.is_gpu else session.arch.memory_bytes
    affordable = int(MEMORY_SHARE * free - scores) // cache
    if affordable < 1:
        raise MemoryError(f"{batch} requests of {kv_len} keys: {cache + scores} bytes, {free} are free")
    return min(size.num_layers, affordable)


def time_parts(session: Session, model: Llama, batch: int, kv_len: int, score: ScoreSpec) -> Answer:
    """Each part as one CUDA graph. Where the caches of all layers do not fit, layers share them in turns, as many as
    fit: an answer about time, not about a batch one could serve."""
    size, layers = session.sizes.model, session.sizes.model.num_layers
    caches = caches_that_fit(session, batch, kv_len)
    kernels = load_kernels(size.heads, device=session.device, dtype=torch.bfloat16, page_size=PAGE_SIZE)
    shape = Shape(batch=batch, kv_len=kv_len, draft_len=DRAFT_LEN, layers=layers, caches=caches, score=score)
    with torch.inference_mode():
        held = Round(model, kernels, shape)
        held.whole()  # so that drafts read a real selection
        parts = {
            "draft": functools.partial(held.draft_step, DRAFT_LEN // 2),
            "verify": held.verify,
            "select": held.select,
            "dense": held.dense_step,
            "whole": held.whole,
        }
        timings = session.time(*(session.captured(part) for part in parts.values()))
    found: dict[str, Timing] = dict(zip(parts, timings, strict=True))
    return session.label(
        {
            "batch": batch,
            "kv_len": kv_len,
            "draft_len": DRAFT_LEN,
            "layers": layers,
            "fits_memory": caches == layers,
            "caches": caches,
            "timings": {name: dataclasses.asdict(timing) for name, timing in found.items()},
            "rungs": sorted(set(kernels.rungs.values())),
        }
    )
