"""Whatever drafts read: sampled texts have the distribution of the full model, greedy ones in float32 are its text."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter

import pytest
import torch

from specattn_codegen.policy import Policy
from specattn_codegen.results import Selection, SparseOutput
from specattn_runtime import load_kernels
from specattn_runtime.decoding.acceptance import Accepted
from specattn_runtime.decoding.decode_spec import DecodeSpec
from specattn_runtime.decoding.engine import generate
from specattn_runtime.decoding.generation import Difference, Generation, RequestResult, first_difference
from specattn_runtime.decoding.presets import PRESETS
from specattn_runtime.decoding.reference_kernels import ReferenceKernels
from specattn_runtime.decoding.sampling import Sampling, token_probabilities
from specattn_runtime.decoding.session import open_session
from specattn_runtime.decoding.turn import Turn
from specattn_runtime.dispatch import Kernels
from specattn_runtime.kernels_protocol import AttentionKernels
from specattn_runtime.model.checkpoint import load_llama
from specattn_runtime.model.llama import Llama
from tiny_models import CONFIG, TRAINED, one_thread, wavy_llama  # noqa: F401 - a fixture that applies by being here

VOCAB, NEW_TOKENS, REQUESTS = 4, 4, 1500
PROMPT = tuple((7 * i * i + i) % VOCAB for i in range(24))
# Sampling and arithmetic that are right fail once in a million; the seeds are fixed, so that right stays right.
SIGNIFICANCE = 1e-6
# The heads of the trained model, so that both need the same kernels.
SMALL: dict[str, object] = {
    **CONFIG,
    "vocab_size": VOCAB,
    "num_hidden_layers": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
}


class WrongDrafts:
    """Real kernels whose selections and draft attention are noise."""

    def __init__(self, kernels: Kernels) -> None:
        self.heads, self.verify_attention = kernels.heads, kernels.verify_attention
        self._select, self._attend = kernels.select_kv, kernels.sparse_attention
        self._generator = torch.Generator().manual_seed(0)

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
        noise = torch.rand(scores.shape, generator=self._generator)
        return self._select(noise, prefix_lens, policy, sink=sink, recent=recent, block=block)

    def sparse_attention(self, *call: object, **options: object) -> SparseOutput:
        found = self._attend(*call, **options)  # type: ignore[arg-type]
        return SparseOutput(torch.randn(found.out.shape, generator=self._generator), found.lse)


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return load_kernels(load_llama(TRAINED, dtype=torch.float32).heads, dtype=torch.float32)


@pytest.fixture(scope="module")
def small() -> Llama:
    return wavy_llama(SMALL, dtype=torch.float32)


def decode_spec(preset: str, **fields: object) -> DecodeSpec:
    spec = DecodeSpec(preset=dataclasses.replace(PRESETS[preset], min_budget=0, sink=1), draft_len=2, budget=0.1)
    return dataclasses.replace(spec, **{"max_new_tokens": NEW_TOKENS, **fields})


@torch.inference_mode()
def exact_law(model: Llama, sampling: Sampling) -> dict[tuple[int, ...], float]:
    """The probability of every text of NEW_TOKENS tokens, all in one dense pass of the float64 oracle."""
    texts = list(itertools.product(range(VOCAB), repeat=NEW_TOKENS))
    oracle, spec = ReferenceKernels(model.heads), decode_spec("dense")
    session = open_session(model, oracle, spec, max_requests=len(texts), num_pages=2 * len(texts))
    session.decoder.prefill(0, PROMPT[:-1])
    for request in range(1, len(texts)):
        session.cache.fork(0, request)
    turns = [Turn(tokens=(*PROMPT[-1:], *text[:-1]), joins=True) for text in texts]
    logits = session.decoder.verify(turns, session.decoder.draft(turns, None)).logits
    found = token_probabilities(logits, [sampling] * len(logits)).view(len(texts), NEW_TOKENS, VOCAB).double()
    chosen = found.gather(2, torch.tensor(texts)[..., None])
    return dict(zip(texts, chosen.flatten(1).prod(dim=1).tolist(), strict=True))


def sampled_texts(model: Llama, kernels: AttentionKernels, spec: DecodeSpec) -> Counter[tuple[int, ...]]:
    """What REQUESTS requests with a seed each get, 100 at a time over one prefix, joining as others end."""
    session = open_session(model, kernels, spec, max_requests=100, num_pages=400, share_prefixes=True)
    for seed in range(REQUESTS):
        own = dataclasses.replace(spec.sampling, seed=seed)
        session.add_request(PROMPT, dataclasses.replace(spec, sampling=own))
    while session.has_work:
        session.step()
    return Counter(session.result(request).tokens for request in range(REQUESTS))


def p_value(counts: Counter[tuple[int, ...]], law: dict[tuple[int, ...], float]) -> float:
    """Pearson's chi-square of the counts; texts expected less than five times make up one cell together."""
    if any(not law[text] for text in counts):
        return 0.0
    total = sum(counts.values())
    common = [text for text, probability in law.items() if probability * total >= 5.0]
    cells = [(counts[text], law[text] * total) for text in common]
    rare = total - sum(expected for _, expected in cells)
    if rare > 1e-6 * total:
        cells.append((total - sum(count for count, _ in cells), rare))
    statistic = sum((count - expected) ** 2 / expected for count, expected in cells)
    assert len(cells) > 10
    half = torch.tensor([(len(cells) - 1) / 2, statistic / 2], dtype=torch.float64)
    return torch.special.gammaincc(half[0], half[1]).item()


@pytest.mark.parametrize(
    ("preset", "sampling", "wrong"),
    [
        ("vegas", Sampling(temperature=1.0), True),
        ("quest", Sampling(temperature=0.8, top_k=3), False),
        ("reference", Sampling(temperature=1.5, top_p=0.9), True),
    ],
)
def test_sampled_texts_have_the_full_models_distribution(
    small: Llama, kernels: Kernels, preset: str, sampling: Sampling, wrong: bool
) -> None:
    served = WrongDrafts(kernels) if wrong else kernels
    counts = sampled_texts(small, served, decode_spec(preset, sampling=sampling))
    assert p_value(counts, exact_law(small, sampling)) > SIGNIFICANCE


def test_the_test_can_tell(small: Llama, kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same loop, should it take any draft: the same samples show it."""

    def accept_all(drafts: torch.Tensor, *given: torch.Tensor) -> Accepted:
        _, targets, draft_lens, _ = given
        return Accepted(draft_lens, targets[torch.arange(len(drafts)), draft_lens].argmax(dim=1))

    law = exact_law(small, Sampling(temperature=1.0))
    monkeypatch.setattr("specattn_runtime.decoding.round.accept_sampled", accept_all)
    counts = sampled_texts(small, WrongDrafts(kernels), decode_spec("vegas", sampling=Sampling(temperature=1.0)))
    assert p_value(counts, law) < SIGNIFICANCE


def continued(model: Llama, kernels: AttentionKernels, spec: DecodeSpec) -> Generation:
    prompts = [(TRAINED / "heldout.txt").read_bytes()[start : start + 150] for start in (0, 200)]
    return generate(model, kernels, [list(prompt) for prompt in prompts], spec)


@pytest.fixture(scope="module")
def trained() -> Llama:
    return load_llama(TRAINED, dtype=torch.float32)


@pytest.fixture(scope="module")
def dense(trained: Llama, kernels: Kernels) -> Generation:
    return continued(trained, kernels, decode_spec("dense", max_new_tokens=30))


@pytest.mark.parametrize("preset", [name for name, preset in PRESETS.items() if preset.drafts])
def test_greedy_texts_in_float32_are_the_dense_ones(
    trained: Llama, kernels: Kernels, dense: Generation, preset: str
) -> None:
    assert min(margin for request in dense.requests for margin in request.margins) > Difference.ROUNDING_MARGIN
    spec = decode_spec(preset, draft_len=4, max_new_tokens=30)
    for served in (kernels, WrongDrafts(kernels)):
        found = continued(trained, served, spec)
        for request, wanted in zip(found.requests, dense.requests, strict=True):
            assert first_difference(request, wanted) is None


def shared(one: RequestResult, other: RequestResult) -> int:
    """Tokens that two texts begin with alike."""
    difference = first_difference(one, other)
    return len(one.tokens) if difference is None else difference.token - 1


@pytest.mark.parametrize("preset", ["vegas", "quest"])
def test_greedy_texts_in_bfloat16_part_from_the_dense_ones_only_where_rounding_decides(
    dense: Generation, preset: str
) -> None:
    """What bfloat16 moves a margin by is what it moves those of dense decoding by: two runs, twice as much."""
    rounded = load_llama(TRAINED, dtype=torch.bfloat16)
    served = load_kernels(rounded.heads, dtype=torch.bfloat16)
    spec = decode_spec(preset, draft_len=4, max_new_tokens=30, budget=0.3)
    beside = continued(rounded, served, spec.without_drafts())
    moved = max(
        abs(one - other)
        for run, exact in zip(beside.requests, dense.requests, strict=True)
        for one, other in zip(run.margins[: shared(run, exact)], exact.margins, strict=False)
    )
    assert 2.0**-8 < moved < 1.0
    found = continued(rounded, served, spec)
    assert found.mean_accepted > 1.0
    for request, wanted in zip(found.requests, beside.requests, strict=True):
        difference = first_difference(request, wanted)
        if difference is not None:
            assert difference.margin == wanted.margins[difference.token - 1]
            assert difference.margin <= 2 * moved
