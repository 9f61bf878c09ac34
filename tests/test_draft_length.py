"""Draft lengths against the definition they maximise, costs against rounds that have them, a session that adapts."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specattn_codegen.results import SparseOutput, VerifyOutput
from specattn_codegen.spec import ScoreSpec
from specattn_runtime.decoding.decode_spec import DecodeSpec
from specattn_runtime.decoding.draft_length import (
    RoundCosts,
    RoundTiming,
    acceptance_rate,
    best_draft_lens,
    expected_tokens,
    fit_costs,
)
from specattn_runtime.decoding.generation import RequestResult
from specattn_runtime.decoding.presets import PRESETS
from specattn_runtime.decoding.reference_kernels import ReferenceKernels
from specattn_runtime.decoding.session import open_session
from specattn_runtime.model.llama import Llama
from tiny_models import one_thread, wavy_llama  # noqa: F401 - a fixture that applies by being here

SECONDS = st.floats(0.001, 1.0)
RATES = st.floats(0.01, 0.99)


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.9, 1.0])
def test_expected_tokens_are_those_of_every_outcome(rate: float) -> None:
    """Over all patterns of four drafts that hold or not, each with its probability."""
    total = 0.0
    for pattern in itertools.product([True, False], repeat=4):
        probability = 1.0
        for holds in pattern:
            probability *= rate if holds else 1.0 - rate
        total += probability * (1 + sum(1 for _ in itertools.takewhile(bool, pattern)))
    assert expected_tokens(rate, 4) == pytest.approx(total)


@settings(deadline=None)
@given(SECONDS, SECONDS, st.floats(0.0, 0.1), RATES, st.integers(1, 12))
def test_one_request_gets_the_length_that_makes_the_most_tokens_a_second(
    step: float, verification: float, row: float, rate: float, longest: int
) -> None:
    costs = RoundCosts(step=step, verification=verification, row=row)
    rates = {k: expected_tokens(rate, k) / (step * k + verification + row * (k + 1)) for k in range(1, longest + 1)}
    (found,) = best_draft_lens(costs, [rate], [longest])
    assert rates[found] == pytest.approx(max(rates.values()))


@settings(deadline=None)
@given(SECONDS, SECONDS, st.floats(0.0, 0.1), st.lists(st.tuples(RATES, st.integers(0, 5)), min_size=1, max_size=3))
def test_a_batch_is_never_slower_than_with_any_common_length(
    step: float, verification: float, row: float, requests: list[tuple[float, int]]
) -> None:
    costs = RoundCosts(step=step, verification=verification, row=row)
    rates, longest = [rate for rate, _ in requests], [most for _, most in requests]

    def speed(lengths: list[int]) -> float:
        tokens = sum(expected_tokens(rate, length) for rate, length in zip(rates, lengths, strict=True))
        return tokens / costs.seconds(max(lengths), sum(lengths) + len(lengths))

    found = best_draft_lens(costs, rates, longest)
    assert all(min(1, most) <= length <= most for length, most in zip(found, longest, strict=True))
    commons = [[min(steps, most) for most in longest] for steps in range(1, 6)]
    assert speed(found) >= max(map(speed, commons)) * (1 - 1e-9)


@settings(deadline=None)
@given(SECONDS, SECONDS, st.floats(0.0, 0.1), st.lists(st.integers(1, 9), min_size=2, max_size=9, unique=True))
def test_costs_are_found_again_in_rounds_that_have_them(
    step: float, verification: float, row: float, lengths: list[int]
) -> None:
    timings = [
        RoundTiming(steps=k, rows=3 * (k + 1), draft_seconds=step * k, verify_seconds=verification + row * 3 * (k + 1))
        for k in lengths
    ]
    found = fit_costs(timings)
    assert dataclasses.astuple(found) == pytest.approx((step, verification, row), abs=1e-9)


def test_costs_that_rounds_say_nothing_about_are_0() -> None:
    same = [RoundTiming(steps=0, rows=4, draft_seconds=0.0, verify_seconds=seconds) for seconds in (1.0, 3.0)]
    assert fit_costs(same) == RoundCosts(step=0.0, verification=2.0, row=0.0)
    falling = [RoundTiming(steps=1, rows=rows, draft_seconds=1.0, verify_seconds=9.0 - rows) for rows in (2, 4)]
    assert fit_costs(falling).row == 0.0


def test_the_rate_counts_drafts_that_had_a_chance() -> None:
    assert acceptance_rate([], []) == 1.0
    assert acceptance_rate([4, 0, 2], [4, 4, 4]) == (6 + 2) / (4 + 1 + 3 + 2)


class TimedKernels(ReferenceKernels):
    """The oracle, whose drafts and verifications take as long as they are told; drafts can be made useless."""

    def __init__(self, model: Llama, *, draft: float, verify: float, useless: bool) -> None:
        super().__init__(model.heads)
        self.now, self._draft, self._verify, self._useless = 0.0, draft, verify, useless

    def verify_attention(
        self,
        *call: torch.Tensor,
        max_q: int,
        max_kv: int | None = None,
        score: ScoreSpec | None = None,
        lse_ref: torch.Tensor | None = None,
        **_: object,
    ) -> VerifyOutput:
        self.now += self._verify
        return super().verify_attention(*call, max_q=max_q, max_kv=max_kv, score=score, lse_ref=lse_ref)

    def sparse_attention(self, q: torch.Tensor, *call: Any, max_q: int, **_: object) -> SparseOutput:
        self.now += self._draft
        found = super().sparse_attention(q, *call, max_q=max_q)
        return found._replace(out=torch.full_like(found.out, 3.0)) if self._useless else found


def decoded(model: Llama, kernels: TimedKernels, *, adaptive: bool) -> RequestResult:
    spec = DecodeSpec(preset=PRESETS["pillar"], draft_len=6, max_new_tokens=60, adaptive=adaptive)
    session = open_session(model, kernels, spec, max_requests=1, num_pages=9, clock=lambda: kernels.now)
    session.add_request([7 * i % 256 for i in range(40)])
    while session.has_work:
        session.step()
    return session.result(0)


@pytest.fixture(scope="module")
def wavy() -> Llama:
    return wavy_llama()


def test_a_session_shortens_drafts_that_do_not_pay_and_keeps_those_that_do(wavy: Llama) -> None:
    fixed = decoded(wavy, TimedKernels(wavy, draft=1.0, verify=2.0, useless=True), adaptive=False)
    short = decoded(wavy, TimedKernels(wavy, draft=1.0, verify=2.0, useless=True), adaptive=True)
    long = decoded(wavy, TimedKernels(wavy, draft=1.0, verify=9.0, useless=False), adaptive=True)
    assert fixed.tokens == short.tokens == long.tokens
    assert set(fixed.drafted[:-6]) == {6}  # the last rounds are shorter, so as not to pass the limit
    assert short.drafted[0] == 6
    assert set(short.drafted[10:]) <= {0, 1}
    assert set(long.drafted[:-2]) == {6}
