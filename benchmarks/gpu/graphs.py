"""Whether a whole draft-verify-select round is one CUDA graph that replays rightly for other requests."""

from __future__ import annotations

import functools

import torch

from benchmarks.gpu.journal import Answer
from benchmarks.gpu.rounds import Round, Shape, drawn_llama
from benchmarks.gpu.session import Session, Step, Steps
from benchmarks.gpu.sizes import PAGE_SIZE
from specattn_codegen.spec import ScoreSpec
from specattn_codegen.tuning.measure import Launch
from specattn_codegen.workloads import DRAFT_LEN
from specattn_runtime.dispatch import load_kernels


def steps(session: Session) -> Steps:
    for name, score in session.sizes.scores.items():
        yield Step(key=f"graphs/{name}", seconds=60, run=functools.partial(replay, session, score))


def replay(session: Session, score: ScoreSpec) -> Answer:
    """Rounds of three batches of requests, launched one by one and replayed from one graph: the same bits, or not."""
    batch, kv_len, layers = session.sizes.graph_round
    size, draft_len = session.sizes.model, DRAFT_LEN
    model = drawn_llama(size, layers, kv_len + 4 * draft_len, torch.bfloat16, session.device)
    kernels = load_kernels(size.heads, device=session.device, dtype=torch.bfloat16, page_size=PAGE_SIZE)
    shape = Shape(batch=batch, kv_len=kv_len, draft_len=draft_len, layers=layers, caches=layers, score=score)
    with torch.inference_mode():
        held = Round(model, kernels, shape)
        graph = session.captured(held.whole)
        batches = [[max(1, kv_len * (batch - b) // (batch + turn)) for b in range(batch)] for turn in range(3)]
        same = [_same(held, graph, lengths) for lengths in batches]
        held.place([kv_len] * batch, range(batch))
        timings = session.time(held.whole, graph)
    return session.label(
        {
            "same_bits": all(same),
            "batches": batches,
            "layers": layers,
            "draft_len": draft_len,
            "eager_us": timings[0].median_us,
            "graph_us": timings[1].median_us,
            "rungs": sorted(set(kernels.rungs.values())),
        }
    )


def _same(held: Round, graph: Launch, lengths: list[int]) -> bool:
    """Whether two rounds in a row leave the same bits either way; the second reads what the first selected."""
    held.place(lengths, [length % 50 for length in lengths])
    before = held.state
    held.whole()
    held.whole()
    eager = held.state
    held.restore(before)
    graph()
    graph()
    return all(torch.equal(*pair) for pair in zip(eager, held.state, strict=True))
