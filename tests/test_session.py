"""Requests that join, wait, differ, end and are cancelled, each as if it were alone. On the float64 oracle."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch

from specattn_codegen import SpecError
from specattn_codegen.results import SparseOutput
from specattn_runtime import load_kernels
from specattn_runtime.decoding.decode_spec import DecodeSpec
from specattn_runtime.decoding.engine import generate
from specattn_runtime.decoding.generation import RequestResult
from specattn_runtime.decoding.presets import PRESETS
from specattn_runtime.decoding.reference_kernels import ReferenceKernels
from specattn_runtime.decoding.sampling import Sampling
from specattn_runtime.decoding.session import Session, open_session
from specattn_runtime.model.llama import Llama
from tiny_models import one_thread, wavy_llama  # noqa: F401 - a fixture that applies by being here


@pytest.fixture(scope="module")
def wavy() -> Llama:
    return wavy_llama()


def decode_spec(preset: str = "vegas", **fields: object) -> DecodeSpec:
    tuned = dataclasses.replace(PRESETS[preset], min_budget=4, sink=0, recent=0)
    return dataclasses.replace(
        DecodeSpec(preset=tuned, draft_len=3, max_new_tokens=8, page_size=4),
        **fields,
    )


def prompt_of(length: int) -> list[int]:
    return torch.randint(256, (length,), generator=torch.Generator().manual_seed(length)).tolist()


def alone(model: Llama, prompt: list[int], spec: DecodeSpec) -> RequestResult:
    return generate(model, ReferenceKernels(model.heads), [prompt], spec).requests[0]


def session_of(model: Llama, spec: DecodeSpec, *, max_requests: int = 3, num_pages: int = 100) -> Session:
    return open_session(model, ReferenceKernels(model.heads), spec, max_requests=max_requests, num_pages=num_pages)


def finish(session: Session) -> None:
    while session.has_work:
        session.step()


DIFFERENT = [
    (25, {}),
    (1, {"draft_len": 5, "max_new_tokens": 11}),
    (18, {"sampling": Sampling(temperature=1.0, top_k=20, seed=3), "budget": 0.5}),
    (9, {"refresh_interval": 3, "max_new_tokens": 14, "draft_len": 1}),
    (33, {"sampling": Sampling(temperature=0.7, top_p=0.8, seed=3), "max_new_tokens": 1}),
]


@pytest.mark.parametrize("preset", ["vegas", "reference", "random", "dense"])
def test_requests_that_share_a_session_are_each_alone(wavy: Llama, preset: str) -> None:
    """They join one a step, differ in everything they may, and wait for places that others leave."""
    spec = decode_spec(preset)
    session = session_of(wavy, spec)
    for length, fields in DIFFERENT:
        session.add_request(prompt_of(length), dataclasses.replace(spec, **fields))
        session.step()
    finish(session)
    for request, (length, fields) in enumerate(DIFFERENT):
        wanted = alone(wavy, prompt_of(length), dataclasses.replace(spec, **fields))
        found = session.result(request)
        assert found.tokens == wanted.tokens
        assert (found.accepted, found.drafted) == (wanted.accepted, wanted.drafted)
    assert session.cache.free_pages == session.cache.num_pages


def test_a_step_tells_what_everybody_got(wavy: Llama) -> None:
    session = session_of(wavy, decode_spec())
    for length in (20, 30):
        session.add_request(prompt_of(length))
    given: dict[int, list[int]] = {0: [], 1: []}
    ends = []
    while session.has_work:
        for progress in session.step():
            given[progress.request] += progress.tokens
            ends += [progress.request] if progress.ended else []
    assert sorted(ends) == [0, 1]
    assert all(tuple(tokens) == session.result(request).tokens for request, tokens in given.items())
    assert session.step() == []


def test_a_request_waits_for_pages_and_loses_nothing(wavy: Llama) -> None:
    spec = decode_spec()
    session = session_of(wavy, spec, max_requests=3, num_pages=18)  # 27, 32 and 17 keys: 7, 8 and 5 pages
    for length in (20, 25, 10):
        session.add_request(prompt_of(length))
    session.step()
    assert (session.running, session.waiting) == ((0, 1), (2,))
    finish(session)
    for request, length in enumerate((20, 25, 10)):
        assert session.result(request).tokens == alone(wavy, prompt_of(length), spec).tokens


def test_who_comes_first_is_served_first(wavy: Llama) -> None:
    session = session_of(wavy, decode_spec(), num_pages=12)
    for length in (20, 25, 4):  # 7, 8 and 3 pages: the last would fit beside the first
        session.add_request(prompt_of(length))
    session.step()
    assert (session.running, session.waiting) == ((0,), (1, 2))


def test_what_no_cache_this_size_can_hold_is_refused_at_once(wavy: Llama) -> None:
    session = session_of(wavy, decode_spec(), num_pages=6)
    with pytest.raises(SpecError, match="18 tokens and 8 new ones need 7 pages of 4 keys and the whole KV cache has 6"):
        session.add_request(prompt_of(18))
    session.add_request(prompt_of(17))
    finish(session)
    assert len(session.result(0).tokens) == 8


def test_prompts_that_begin_alike_share_pages_and_nothing_else(wavy: Llama) -> None:
    spec = decode_spec("pillar")
    begin = prompt_of(30)
    prompts = [begin, [*begin[:22], 5, 6, 7, 8, 9], [*begin[:13], 1], begin]
    session = open_session(wavy, ReferenceKernels(wavy.heads), spec, max_requests=4, num_pages=100, share_prefixes=True)
    for prompt in prompts:
        session.add_request(prompt)
    session.step()
    # All but a prompt's last 4 tokens can be shared. The second shares 22, five whole pages of its seven; the third 10,
    # two of its four; the last 26, six of its eight. Each wrote to its copy of the page in which the sharing ends.
    held = [session.cache.pages(place) for place in range(4)]
    assert [len(set(pages) - set(held[0])) for pages in held] == [0, 2, 2, 2]
    finish(session)
    for request, prompt in enumerate(prompts):
        assert session.result(request).tokens == alone(wavy, prompt, spec).tokens
    assert session.cache.free_pages == session.cache.num_pages


def test_shared_pages_let_more_requests_in(wavy: Llama) -> None:
    spec = decode_spec()
    for share, running in ((False, (0, 1)), (True, (0, 1, 2))):
        session = open_session(
            wavy, ReferenceKernels(wavy.heads), spec, max_requests=3, num_pages=24, share_prefixes=share
        )
        for _ in range(3):
            session.add_request(prompt_of(35))  # 42 keys: 11 pages
        session.step()
        assert session.running == running
        finish(session)
        assert len({session.result(request).tokens for request in range(3)}) == 1


def test_a_cancelled_request_leaves_its_place_and_keeps_its_tokens(wavy: Llama) -> None:
    spec = decode_spec()
    session = session_of(wavy, spec, max_requests=1)
    for length in (20, 21, 22):
        session.add_request(prompt_of(length))
    session.step()
    session.cancel(0)
    session.cancel(1)
    assert (session.running, session.waiting) == ((), (2,))
    assert session.cache.free_pages == session.cache.num_pages
    finish(session)
    assert len(session.result(0).tokens) == 1
    assert session.result(1).tokens == ()
    assert session.result(2).tokens == alone(wavy, prompt_of(22), spec).tokens


def test_a_stop_token_inside_a_draft_ends_its_request_there(wavy: Llama) -> None:
    spec = decode_spec(budget=1.0)  # every draft holds
    free = alone(wavy, prompt_of(20), spec)
    for stop in free.tokens[1:4]:  # the first, the second and the third draft of the first round
        ended = alone(wavy, prompt_of(20), dataclasses.replace(spec, stop_tokens=frozenset({stop})))
        assert ended.tokens == free.tokens[: free.tokens.index(stop) + 1]


@pytest.mark.parametrize("preset", ["pillar", "reference", "hybrid", "streaming", "random"])
@pytest.mark.parametrize("interval", [2, 5])
def test_keys_that_are_selected_less_often_give_the_same_text(wavy: Llama, preset: str, interval: int) -> None:
    spec = decode_spec(preset, max_new_tokens=20)
    wanted = alone(wavy, prompt_of(40), spec)
    assert alone(wavy, prompt_of(40), dataclasses.replace(spec, refresh_interval=interval)).tokens == wanted.tokens


class TailKernels(ReferenceKernels):
    """Remembers where the dense tail of each draft step began."""

    def __init__(self, model: Llama) -> None:
        super().__init__(model.heads)
        self.tails: list[int] = []

    def sparse_attention(self, q: torch.Tensor, *call: Any, max_q: int, **_: object) -> SparseOutput:
        self.tails.append(int(call[-1][0]))
        return super().sparse_attention(q, *call, max_q=max_q)


def test_selections_last_for_the_interval_and_the_tail_grows(wavy: Llama) -> None:
    kernels = TailKernels(wavy)
    spec = decode_spec("pillar", refresh_interval=3, max_new_tokens=30)
    found = generate(wavy, kernels, [prompt_of(40)], spec).requests[0]
    # By rounds, of as many steps as drafts and two layers: the prompt's selection serves the first three, and so on.
    steps = iter(kernels.tails)
    rounds = [{next(steps) for _ in range(2 * drafted)} for drafted in found.drafted]
    lengths = [40 + emitted for emitted in itertools.accumulate((held + 1 for held in found.accepted), initial=0)]
    for number, tails in enumerate(rounds):
        served = number - number % 3
        assert tails <= {36 if number < 3 else lengths[served - 1]}
    assert len(rounds) > 6


def test_the_same_seed_is_the_same_text_and_another_is_another(wavy: Llama) -> None:
    texts = [
        alone(wavy, prompt_of(20), decode_spec(sampling=Sampling(temperature=1.0, seed=seed))).tokens
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"page_size": 8}, "preset=vegas, page_size=8: one session has one of each, vegas and 4"),
        ({"preset": PRESETS["pillar"]}, "preset=pillar"),
        ({"max_new_tokens": 250}, "prompt 0: 20 tokens and 250 new ones exceed the model's 256 positions"),
    ],
)
def test_requests_that_a_session_cannot_serve(wavy: Llama, fields: dict[str, object], message: str) -> None:
    session = session_of(wavy, decode_spec())
    with pytest.raises(SpecError, match=message):
        session.add_request(prompt_of(20), dataclasses.replace(decode_spec(), **fields))
    assert not session.has_work


def test_sets_of_kernels_are_one_or_one_a_layer(wavy: Llama) -> None:
    kernels = ReferenceKernels(wavy.heads)
    with pytest.raises(SpecError, match="kernels: 3 sets for 2 layers; give one, or one a layer"):
        open_session(wavy, [kernels] * 3, decode_spec(), max_requests=1, num_pages=9)
    with pytest.raises(SpecError, match="max_requests=0"):
        open_session(wavy, kernels, decode_spec(), max_requests=0, num_pages=9)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": torch.bfloat16}, "dtype=float32: the kernels were loaded for dtype=bfloat16"),
        ({"page_size": 16}, "page_size=4: the kernels were loaded for page_size=16"),
        ({"num_kv_heads": 6}, "num_kv_heads=2: the kernels were loaded for num_kv_heads=6"),
    ],
)
def test_kernels_must_be_those_of_the_model_and_its_cache(changes: dict[str, Any], message: str) -> None:
    model = wavy_llama(dtype=torch.float32)
    heads = dataclasses.replace(model.heads, num_kv_heads=changes.pop("num_kv_heads", model.heads.num_kv_heads))
    loaded = load_kernels(heads, **{"dtype": torch.float32, "page_size": 4, **changes})
    with pytest.raises(SpecError, match=message):
        open_session(model, loaded, decode_spec(), max_requests=1, num_pages=9)


def test_a_model_elsewhere_is_not_served_by_kernels_of_the_host() -> None:
    model = wavy_llama(dtype=torch.float32)
    elsewhere = dataclasses.replace(model, embedding=model.embedding.to("meta"))
    loaded = load_kernels(model.heads, dtype=torch.float32, page_size=4)
    with pytest.raises(SpecError, match="device=meta: the kernels were loaded for device=cpu; load_kernels for what"):
        open_session(elsewhere, loaded, decode_spec(), max_requests=1, num_pages=9)
