"""Losslessness: whatever the drafts read, the text is that of dense decoding. Strict, on the float64 oracle."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from specattn_codegen import ScoreSpec, SpecError
from specattn_codegen.buckets import bucket
from specattn_codegen.policy import Policy
from specattn_codegen.results import Selection, SparseOutput, VerifyOutput
from specattn_runtime.cache.paged_cache import PagedCache
from specattn_runtime.decoding.acceptance import accept_greedy
from specattn_runtime.decoding.decode_spec import DecodeSpec
from specattn_runtime.decoding.draft_view import DraftView
from specattn_runtime.decoding.engine import generate, warm_up
from specattn_runtime.decoding.generation import RequestResult, first_difference
from specattn_runtime.decoding.presets import PRESETS
from specattn_runtime.decoding.reference_kernels import ReferenceKernels
from specattn_runtime.decoding.round import Decoder
from specattn_runtime.decoding.stopwatch import Stopwatch
from specattn_runtime.decoding.turn import Turn
from specattn_runtime.model.checkpoint import load_llama
from specattn_runtime.model.llama import Llama
from tiny_models import STRETCHED, TRAINED, one_thread, wavy_llama  # noqa: F401 - a fixture that applies by being here

SPECULATIVE = [name for name, preset in PRESETS.items() if preset.drafts]
CODE = b"""class Reader:
    def __init__(self, stream):
        self.stream = stream

    def read(self):
        return self."""


def decode_spec(preset: str, *, min_budget: int = 4, sink: int = 0, recent: int = 0, **fields: float) -> DecodeSpec:
    tuned = dataclasses.replace(PRESETS[preset], min_budget=min_budget, sink=sink, recent=recent)
    return dataclasses.replace(DecodeSpec(preset=tuned, draft_len=4, budget=0.07, max_new_tokens=24), **fields)


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return torch.randint(256, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def run(
    model: Llama, prompts: list[list[int]], spec: DecodeSpec, kernels: ReferenceKernels | None = None
) -> list[RequestResult]:
    return list(generate(model, kernels or ReferenceKernels(model.config.heads), prompts, spec).requests)


@pytest.fixture(scope="module")
def wavy() -> Llama:
    return wavy_llama()


@pytest.mark.parametrize(
    ("preset", "page_size"),
    [*((preset, 7) for preset in SPECULATIVE), *itertools.product(["pillar", "quest"], [1, 16])],
)
def test_every_preset_gives_the_dense_text(wavy: Llama, preset: str, page_size: int) -> None:
    spec = decode_spec(preset, page_size=page_size)
    (sparse,), (dense,) = run(wavy, [prompt_of(60)], spec), run(wavy, [prompt_of(60)], spec.without_drafts())
    assert sparse.tokens == dense.tokens
    assert len(set(dense.tokens)) > 5  # a text that could go wrong
    assert sum(sparse.accepted) < sum(sparse.drafted)  # drafts were wrong, and it did not matter


@pytest.mark.parametrize("preset", [name for name in SPECULATIVE if name != "random"])
def test_the_trained_model_accepts_drafts_and_gives_the_dense_text(preset: str) -> None:
    model = load_llama(TRAINED, dtype=torch.float64)
    spec = decode_spec(preset, min_budget=12, sink=2, page_size=4)
    (sparse,), (dense,) = run(model, [list(CODE)], spec), run(model, [list(CODE)], spec.without_drafts())
    assert sparse.tokens == dense.tokens
    assert sparse.margins == pytest.approx(dense.margins, abs=1e-9)
    assert len(sparse.accepted) < len(dense.accepted) / 2  # several tokens a round


def test_other_architecture_switches(wavy: Llama) -> None:
    model = wavy_llama(STRETCHED)
    spec = decode_spec("pillar")
    (sparse,), (dense,) = run(model, [prompt_of(60)], spec), run(model, [prompt_of(60)], spec.without_drafts())
    assert sparse.tokens == dense.tokens
    assert sparse.tokens != run(wavy, [prompt_of(60)], spec)[0].tokens


class GarbageKernels(ReferenceKernels):
    """Selects keys by a random number instead of their score."""

    def select_kv(
        self,
        scores: torch.Tensor,
        prefix_lens: torch.Tensor,
        policy: Policy,
        *,
        sink: int = 0,
        recent: int = 0,
        block: int = 1,
    ) -> Selection:
        noise = torch.rand(scores.shape, generator=torch.Generator().manual_seed(scores.shape[-1]))
        return super().select_kv(noise, prefix_lens, policy, sink=sink, recent=recent, block=block)


class BlindKernels(ReferenceKernels):
    """Drafts see the same whatever they look at: the worst drafts there are, and their keys go into the cache too."""

    def sparse_attention(self, q: torch.Tensor, *_: object, **__: object) -> SparseOutput:
        return SparseOutput(torch.full_like(q, 3.0), torch.zeros(q.shape[:2]))


@pytest.mark.parametrize("kernels", [GarbageKernels, BlindKernels])
def test_bad_drafts_cost_speed_and_nothing_else(wavy: Llama, kernels: type[ReferenceKernels]) -> None:
    spec = decode_spec("vegas", min_budget=1)
    (dense,) = run(wavy, [prompt_of(60)], spec.without_drafts())
    (bad,) = run(wavy, [prompt_of(60)], spec, kernels(wavy.config.heads))
    assert bad.tokens == dense.tokens
    assert sum(bad.accepted) < sum(bad.drafted) / 2


@pytest.mark.parametrize("preset", SPECULATIVE)
def test_with_everything_selected_every_draft_is_accepted(wavy: Llama, preset: str) -> None:
    (result,) = run(wavy, [prompt_of(30)], decode_spec(preset, budget=1.0))
    assert result.accepted == result.drafted == (4, 4, 4, 4, 2)


@pytest.mark.parametrize("preset", SPECULATIVE)
def test_a_ragged_batch_is_each_request_alone(wavy: Llama, preset: str) -> None:
    spec = decode_spec(preset, page_size=7, max_new_tokens=12)
    prompts = [prompt_of(length, seed=length) for length in (41, 1, 5, 18)]
    alone = [run(wavy, [prompt], spec)[0] for prompt in prompts]
    assert [result.tokens for result in run(wavy, prompts, spec)] == [result.tokens for result in alone]
    assert [result.accepted for result in run(wavy, prompts, spec)] == [result.accepted for result in alone]


@pytest.mark.parametrize("max_new_tokens", range(1, 8))
def test_exactly_as_many_tokens_as_asked_for(wavy: Llama, max_new_tokens: int) -> None:
    kernels = ReferenceKernels(wavy.config.heads)
    spec = decode_spec("vegas", budget=1.0, max_new_tokens=max_new_tokens)
    result = generate(wavy, kernels, [prompt_of(20)], spec)
    (request,) = result.requests
    assert len(request.tokens) == len(request.margins) == max_new_tokens
    assert sum(request.accepted) + len(request.accepted) == max_new_tokens - 1  # the first token ends the prefill
    assert result.full_passes == 1 + len(request.accepted)
    dense = generate(wavy, kernels, [prompt_of(20)], spec.without_drafts())
    assert dense.full_passes == max_new_tokens
    assert dense.requests[0].tokens == request.tokens


def test_a_text_may_fill_every_position(wavy: Llama) -> None:
    spec = decode_spec("streaming", max_new_tokens=6, draft_len=9)
    prompt = prompt_of(wavy.config.max_positions - 6)
    assert len(run(wavy, [prompt], spec)[0].tokens) == 6
    with pytest.raises(SpecError, match="251 tokens and 6 new ones exceed the model's 256 positions"):
        run(wavy, [[*prompt, 1]], spec)


def test_a_stop_token_ends_a_request_and_not_its_neighbours(wavy: Llama) -> None:
    spec = decode_spec("vegas", page_size=3)
    prompts = [prompt_of(30, seed=1), prompt_of(12, seed=2)]
    free = run(wavy, prompts, spec)
    stop = next(token for token in free[0].tokens[5:] if token not in free[1].tokens)
    stopped = run(wavy, prompts, dataclasses.replace(spec, stop_tokens=frozenset({stop})))
    assert stopped[0].tokens == free[0].tokens[: free[0].tokens.index(stop) + 1]
    assert len(stopped[0].margins) == len(stopped[0].tokens) < 24
    assert stopped[1].tokens == free[1].tokens


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "prompts: give at least one"),
        ([[1], []], "prompt 1: empty"),
        ([[0] * 233], "prompt 0: 233 tokens and 24 new ones exceed the model's 256 positions"),
        ([[5, 256]], "prompt 0: token 256 is outside the model's vocabulary of 256"),
        ([[-1]], "token -1"),
    ],
)
def test_prompts_that_cannot_be_served(wavy: Llama, prompts: list[list[int]], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        run(wavy, prompts, decode_spec("vegas"))


def decoder_of(model: Llama, spec: DecodeSpec) -> Decoder:
    cache = PagedCache(model.config.heads, layers=2, num_pages=40, page_size=3, batch=1, dtype=torch.float64)
    return Decoder(
        model=model,
        kernels=(ReferenceKernels(model.config.heads),) * 2,
        cache=cache,
        preset=spec.preset,
        stopwatch=Stopwatch(),
    )


def join(decoder: Decoder, prompt: list[int], spec: DecodeSpec) -> DraftView | None:
    """Takes a prompt in, its last five tokens as a round; what the first drafts read."""
    decoder.prefill(0, prompt[:-5])
    return decoder.round([Turn(tokens=tuple(prompt[-5:]), joins=True, policy=spec.policy)], None)[1]


def same_cache(one: Decoder, other: Decoder) -> bool:
    pools = [(a.cache.keys, a.cache.values) for a in (one, other)]
    return all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(*pools, strict=True))


@torch.inference_mode()
def test_verification_leaves_nothing_of_the_drafts_behind(wavy: Llama) -> None:
    spec, prompt = decode_spec("pillar"), prompt_of(40)
    drafted, untouched = decoder_of(wavy, spec), decoder_of(wavy, spec)
    view, turns = join(drafted, prompt, spec), [Turn(tokens=(7,), draft_len=4, policy=spec.policy)]
    join(untouched, prompt, spec)
    drafts = drafted.draft(turns, view)
    assert not same_cache(drafted, untouched)
    drafted.cache.rewind(0, 40)
    ours, theirs = drafted.verify(turns, drafts), untouched.verify(turns, drafts)
    assert same_cache(drafted, untouched)
    assert torch.equal(ours.logits, theirs.logits)


@torch.inference_mode()
def test_a_round_keeps_the_accepted_keys_and_no_other(wavy: Llama) -> None:
    spec, prompt = decode_spec("vegas"), prompt_of(40)
    decoder = decoder_of(wavy, spec)
    view = join(decoder, prompt, spec)
    (emitted,), after = decoder.round([Turn(tokens=(7,), draft_len=4, policy=spec.policy)], view)
    assert emitted is not None
    assert after is not None
    assert decoder.cache.lengths == [40 + len(emitted.tokens)]
    assert after.tail_start.tolist() == [40]  # what was just accepted lies in the tail
    # The same keys as a cache that was only ever given the accepted text.
    fresh = decoder_of(wavy, spec)
    fresh.prefill(0, [*prompt, 7, *emitted.tokens[:-1]])
    slots = decoder.cache.lengths[0]
    for ours, theirs in ((decoder.cache.keys, fresh.cache.keys), (decoder.cache.values, fresh.cache.values)):
        for layer in range(2):
            pair = ours[layer].flatten(0, 1)[:slots], theirs[layer].flatten(0, 1)[:slots]
            assert torch.allclose(*pair, atol=1e-12, rtol=0)


def test_drafts_agree_with_dense_decoding_of_the_same_keys(wavy: Llama) -> None:
    """One round by hand, piece by piece: what is emitted is what acceptance says."""
    spec = decode_spec("streaming")
    decoder, turns = decoder_of(wavy, spec), [Turn(tokens=(7,), draft_len=4, policy=spec.policy)]
    with torch.inference_mode():
        view = join(decoder, prompt_of(20), spec)
        drafted = decoder.draft(turns, view)
        decoder.rewind([20])
        targets = decoder.verify(turns, drafted).logits.argmax(dim=1)[None]
        accepted = int(accept_greedy(drafted.tokens[:, 1:], targets, torch.tensor([4])))
        decoder.rewind([20])
        (emitted,), _ = decoder.round(turns, view)
    assert emitted is not None
    assert emitted.tokens == targets[0, : accepted + 1].tolist()


class RecordingKernels(ReferenceKernels):
    """Remembers the rows, size buckets and scores it was called with."""

    def __init__(self, model: Llama) -> None:
        super().__init__(model.config.heads)
        self.calls: set[tuple[int, int, ScoreSpec | None]] = set()

    def verify_attention(
        self, *args: torch.Tensor, max_q: int, max_kv: int | None = None, score: ScoreSpec | None = None, **_: object
    ) -> VerifyOutput:
        self.calls.add((max_q, bucket(max_kv or 1), score))
        return super().verify_attention(*args, max_q=max_q, max_kv=max_kv, score=score)


@pytest.mark.parametrize(("drafts", "interval"), [(True, 1), (True, 2), (False, 1)])
@pytest.mark.parametrize("prompt_len", [20, 60])
def test_warming_up_runs_the_kernels_a_run_starts_and_ends_with(
    wavy: Llama, prompt_len: int, drafts: bool, interval: int
) -> None:
    spec = decode_spec("vegas", budget=1.0, max_new_tokens=10, refresh_interval=interval)
    if not drafts:
        spec = spec.without_drafts()
    warm, real = RecordingKernels(wavy), RecordingKernels(wavy)
    warm_up(wavy, warm, [prompt_of(prompt_len)], spec)
    generate(wavy, real, [prompt_of(prompt_len)], spec)
    # A draft length that shrinks at the end of a run meets buckets of rows between the two that are warmed.
    assert {call for call in real.calls if call[0] in (1, 5)} <= warm.calls


def test_statistics_add_up(wavy: Llama) -> None:
    ticks = itertools.count()
    spec = decode_spec("vegas")
    kernels = ReferenceKernels(wavy.config.heads)
    result = generate(wavy, kernels, [prompt_of(60)], spec, clock=lambda: float(next(ticks)))
    (request,) = result.requests
    rounds = len(request.accepted)
    # Each phase of a round reads the clock twice and nothing else does in between.
    assert result.phases == {"draft": rounds, "verify": rounds, "select": rounds}
    assert result.prefill_seconds + result.decode_seconds == next(ticks) - 1
    assert result.decode_rate == pytest.approx(23 / result.decode_seconds)
    assert result.total_rate == pytest.approx(24 / (result.prefill_seconds + result.decode_seconds))
    assert sum(result.accepted_histogram.values()) == rounds
    assert sum(length * times for length, times in result.accepted_histogram.items()) == sum(request.accepted)
    assert result.mean_accepted == pytest.approx((23 - rounds) / rounds)
    assert result.mean_drafted == sum(request.drafted) / rounds
    # ceil(7% of 60 .. 83 keys), or 4 of them at least
    assert 5 / 84 < result.selected_share < 6 / 55


def result_of(tokens: list[int], margins: list[float]) -> RequestResult:
    return RequestResult(tokens=tuple(tokens), margins=tuple(margins), accepted=(), drafted=())


def test_the_first_difference_is_named_with_the_dense_margin() -> None:
    dense = result_of([1, 2, 3, 4], [0.5, 0.4, 0.0002, 0.1])
    assert first_difference(result_of([1, 2, 3, 4], [9.0] * 4), dense) is None
    difference = first_difference(result_of([1, 2, 9, 4], [9.0] * 4), dense)
    assert difference is not None
    assert (difference.token, difference.margin, difference.is_rounding_tie) == (3, 0.0002, True)
    early = first_difference(result_of([1], [9.0]), dense)
    assert early is not None
    assert (early.token, early.margin, early.is_rounding_tie) == (2, 0.4, False)
    late = first_difference(dense, result_of([1, 2, 3], [0.5] * 3))
    assert late is not None
    assert (late.token, late.margin) == (4, 0.1)
