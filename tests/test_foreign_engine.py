"""The pieces of a round, called one by one by an engine with a cache and a schedule of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from specattn_codegen import HeadConfig, SpecError, TopK
from specattn_codegen.results import SparseOutput, VerifyOutput
from specattn_runtime.cache.layouts import vllm_cache
from specattn_runtime.cache.rows import Rows, ragged_rows
from specattn_runtime.decoding.decode_spec import DecodeSpec
from specattn_runtime.decoding.draft_view import DraftView
from specattn_runtime.decoding.engine import generate
from specattn_runtime.decoding.presets import PRESETS
from specattn_runtime.decoding.reference_kernels import ReferenceKernels
from specattn_runtime.decoding.round import Decoder
from specattn_runtime.decoding.sampling import Sampling
from specattn_runtime.decoding.stopwatch import Stopwatch
from specattn_runtime.decoding.turn import Emitted, Turn
from specattn_runtime.model.llama import Llama
from tiny_models import one_thread, wavy_llama  # noqa: F401 - a fixture that applies by being here

BLOCK, BLOCKS, NEW_TOKENS = 4, 60, 12
PROMPTS = ([3 * i % 256 for i in range(31)], [11 * i % 256 for i in range(17)])
POLICY = TopK(k=5)


class BlockCache:
    """Packed blocks as vLLM has them, [num_blocks, Hkv, block_size, 2 * D] a layer, and block tables filled once."""

    bounds = None
    page_size = BLOCK

    def __init__(self, heads: HeadConfig, layers: int, requests: int) -> None:
        shape = (BLOCKS, heads.num_kv_heads, BLOCK, 2 * heads.head_dim)
        views = [vllm_cache(torch.full(shape, 7.0, dtype=torch.float64), "packed") for _ in range(layers)]
        self.keys = [view.k_cache for view in views]
        self.values = [view.v_cache for view in views]
        order = torch.randperm(BLOCKS, generator=torch.Generator().manual_seed(0))
        self.page_table = order.view(requests, -1).int()
        self.lengths = [0] * requests

    def extend(self, counts: Sequence[int]) -> Rows:
        rows = ragged_rows(self.lengths, counts, self.page_table, BLOCK)
        self.lengths = rows.kv_lens.tolist()
        return rows

    def rewind(self, request: int, length: int) -> None:
        self.lengths[request] = length

    def write(self, layer: int, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.keys[layer][slots // BLOCK, slots % BLOCK] = keys
        self.values[layer][slots // BLOCK, slots % BLOCK] = values


@pytest.fixture(scope="module")
def wavy() -> Llama:
    return wavy_llama()


def decoder_of(model: Llama, preset: str) -> Decoder:
    return Decoder(
        model=model,
        kernels=(ReferenceKernels(model.heads),) * model.num_layers,
        cache=BlockCache(model.heads, model.num_layers, len(PROMPTS)),
        preset=PRESETS[preset],
        stopwatch=Stopwatch(),
    )


def one_round(
    decoder: Decoder, turns: Sequence[Turn | None], view: DraftView | None
) -> tuple[list[Emitted | None], DraftView]:
    """draft, rewind, verify, accept, refresh, rewind, with nothing else in between."""
    prefixes = list(decoder.cache.lengths)
    drafted = decoder.draft(turns, view)
    decoder.rewind(prefixes)
    verified = decoder.verify(turns, drafted)
    emitted = decoder.accept(turns, drafted, verified)
    view = decoder.refresh(turns, verified, view)
    kept = [
        len(turn.tokens) + len(given.tokens) - 1 if turn and given else 0
        for turn, given in zip(turns, emitted, strict=True)
    ]
    decoder.rewind([prefix + count for prefix, count in zip(prefixes, kept, strict=True)])
    return emitted, view


def uniforms(count: int, request: int) -> tuple[float, ...]:
    return tuple(torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(request)).tolist())


@torch.inference_mode()
def scheduled(model: Llama, preset: str) -> list[list[int]]:
    """Greedy texts by a schedule of this engine's own: the second prompt comes two rounds later and in two chunks, the
    requests take turns of different draft lengths, and every third round belongs to one of them alone."""
    decoder, texts, view, number = decoder_of(model, preset), [list[int](), list[int]()], None, 0
    decoder.prefill(0, PROMPTS[0][:-4])
    while min(map(len, texts)) < NEW_TOKENS:
        turns: list[Turn | None] = [None, None]
        for request, text in enumerate(texts):
            if number == 0 and request == 0:
                turns[0] = Turn(tokens=tuple(PROMPTS[0][-4:]), joins=True, policy=POLICY)
            elif number == 2 and request == 1:
                decoder.prefill(1, PROMPTS[1][:9])
                decoder.prefill(1, PROMPTS[1][9:-2])
                turns[1] = Turn(tokens=tuple(PROMPTS[1][-2:]), joins=True, policy=POLICY)
            elif text and number % 3 != request:
                turns[request] = Turn(tokens=(text[-1],), draft_len=(number + 2 * request) % 5, policy=POLICY)
        if any(turns):
            emitted, view = one_round(decoder, turns, view)
            for text, given in zip(texts, emitted, strict=True):
                text += given.tokens if given else []
        number += 1
    return [text[:NEW_TOKENS] for text in texts]


@pytest.mark.parametrize("preset", ["vegas", "pillar", "reference", "hybrid", "streaming", "random"])
def test_a_foreign_engine_gets_the_dense_text(wavy: Llama, preset: str) -> None:
    spec = DecodeSpec(preset=PRESETS["dense"], max_new_tokens=NEW_TOKENS)
    dense = generate(wavy, ReferenceKernels(wavy.heads), PROMPTS, spec)
    assert scheduled(wavy, preset) == [list(request.tokens) for request in dense.requests]


@torch.inference_mode()
def test_its_samples_are_those_of_the_same_numbers(wavy: Llama) -> None:
    """Greedy and sampled requests in one batch, against each of them alone."""
    hot = Sampling(temperature=1.0, top_p=0.9)

    def turns(request: int) -> list[Turn]:
        sampling = hot if request else Sampling()
        end = tuple(PROMPTS[request][-4:])
        return [
            Turn(tokens=end, joins=True, policy=POLICY, sampling=sampling, uniforms=uniforms(1, request)),
            Turn(tokens=(5,), draft_len=3, policy=POLICY, sampling=sampling, uniforms=uniforms(7, request)),
        ]

    def run(present: Sequence[int]) -> list[list[int]]:
        decoder, view, found = decoder_of(wavy, "pillar"), None, [list[int](), list[int]()]
        for request in present:
            decoder.prefill(request, PROMPTS[request][:-4])
        for step in range(2):
            emitted, view = one_round(decoder, [turns(b)[step] if b in present else None for b in range(2)], view)
            for text, given in zip(found, emitted, strict=True):
                text += given.tokens if given else []
        return found

    together = run((0, 1))
    assert together == [run((0,))[0], run((1,))[1]]
    assert all(len(text) >= 2 for text in together)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tokens": ()}, "0 tokens: a turn has its newest one"),
        ({"tokens": (1, 2)}, "2 tokens: a turn has its newest one, or with joins=True the end of a prompt"),
        ({"draft_len": -1}, "draft_len=-1"),
        ({"joins": True, "draft_len": 1}, "draft_len=1: must be at least 0, and 0 for a prompt that joins"),
        ({"sampling": Sampling(temperature=1.0), "draft_len": 2}, "0 uniforms: sampling with draft_len=2 takes 5"),
    ],
)
def test_turns_that_no_round_can_run(fields: dict[str, object], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        Turn(**{"tokens": (1,), **fields})


@torch.inference_mode()
def test_a_cache_without_bounds_cannot_serve_quest(wavy: Llama) -> None:
    decoder = decoder_of(wavy, "quest")
    joins = Turn(tokens=tuple(PROMPTS[0][:4]), joins=True, policy=POLICY)
    _, view = decoder.round([joins, None], None)
    with pytest.raises(SpecError, match="preset=quest: ranks pages by bounds that this cache does not keep"):
        decoder.round([Turn(tokens=(1,), draft_len=1, policy=POLICY), None], view)


@pytest.mark.parametrize("preset", ["pillar", "vegas", "quest"])
def test_layers_with_a_window_a_soft_cap_and_sinks_of_their_own(wavy: Llama, preset: str) -> None:
    heads = wavy.heads
    windowed = ReferenceKernels(dataclasses.replace(heads, window=9, softcap=3.0))
    sunk = SinkKernels(dataclasses.replace(heads, sinks=True, scale=0.5))
    tuned = dataclasses.replace(PRESETS[preset], min_budget=0)
    spec = DecodeSpec(preset=tuned, draft_len=3, budget=0.2, max_new_tokens=NEW_TOKENS, page_size=BLOCK)
    found = generate(wavy, (windowed, sunk), PROMPTS, spec)
    dense = generate(wavy, (windowed, sunk), PROMPTS, spec.without_drafts())
    assert [request.tokens for request in found.requests] == [request.tokens for request in dense.requests]
    plain = generate(wavy, ReferenceKernels(heads), PROMPTS, spec)
    assert [request.tokens for request in plain.requests] != [request.tokens for request in dense.requests]


class SinkKernels(ReferenceKernels):
    """As gpt-oss has it: a learned logit a head, bound to the layer's kernels."""

    def verify_attention(self, *call: torch.Tensor, max_q: int, **options: Any) -> VerifyOutput:
        return super().verify_attention(*call, max_q=max_q, **options, sinks=self._sinks(call[0]))

    def sparse_attention(self, q: torch.Tensor, *call: Any, max_q: int, **options: Any) -> SparseOutput:
        return super().sparse_attention(q, *call, max_q=max_q, **options, sinks=self._sinks(q))

    def _sinks(self, q: torch.Tensor) -> torch.Tensor:
        return torch.linspace(-1.0, 1.0, q.shape[1])
