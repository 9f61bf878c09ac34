"""What the selection tests of every backend share: hostile scores, any policy, and calls as a caller makes them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from hypothesis import strategies as st

from specattn_codegen.calls import select_call
from specattn_codegen.kernel import SelectCall
from specattn_codegen.policy import Policy, Threshold, TopK, TopP

NAN, INFINITY = math.nan, math.inf
LEAST = 2.0**-149  # the smallest score above 0
GREATEST = (2.0 - 2.0**-23) * 2.0**127


def _shuffled(count: int) -> torch.Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(0)).float()


# Rows that break selections which bucket, sample or sum carelessly, by their length.
MASSES: dict[str, Callable[[int], torch.Tensor]] = {
    "constant": lambda n: torch.full((n,), 0.25),
    "two values": lambda n: (torch.arange(n) % 3 == 0).float() + 0.5,
    "one bucket": lambda n: 1.0 + torch.arange(n).flip(0).float() * 2.0**-23,
    "few distinct": lambda n: (_shuffled(n) % 7) / 8,
    "denormals": lambda n: (_shuffled(n) % 97) * LEAST,
    "ascending": lambda n: torch.arange(n).float(),
    "descending": lambda n: torch.arange(n).flip(0).float(),
    "signed zeros": lambda n: torch.where(torch.arange(n) % 2 == 0, 0.0, -0.0),
    "one giant": lambda n: torch.where(torch.arange(n) == n // 2, 1e30, 1e-30),
    "mostly zero": lambda n: torch.where(torch.arange(n) % 11 == 3, _shuffled(n) + 1, 0.0),
    "greatest finite": lambda n: torch.full((n,), GREATEST),
    "all magnitudes": lambda n: torch.exp2(_shuffled(n) % 250 - 149),
    "late": lambda n: torch.where(torch.arange(n) < n - 5, 2.0**-30, 1.0),
}
SCORES = {
    **MASSES,
    "signs": lambda n: _shuffled(n) - n // 2,
    "infinities": lambda n: torch.tensor([INFINITY, -INFINITY, 0.0, 1.0]).repeat(-(-n // 4))[:n],
    "all minus infinity": lambda n: torch.full((n,), -INFINITY),
    "NaN below minus infinity": lambda n: torch.tensor([NAN, -INFINITY, NAN, -1.0]).repeat(-(-n // 4))[:n],
    "all NaN": lambda n: torch.full((n,), NAN),
    "NaN of either sign": lambda n: torch.where(torch.arange(n) % 5 == 0, -NAN, torch.arange(n).float()),
}

any_score = st.one_of(
    st.floats(width=32), st.sampled_from([0.0, -0.0, NAN, INFINITY, -INFINITY, LEAST, -LEAST, 1.0, 2.0**-126])
)
any_mass = st.one_of(st.floats(0.0, GREATEST, width=32), st.sampled_from([0.0, -0.0, LEAST, 1.0, 0.5, GREATEST]))

top_k: st.SearchStrategy[Policy] = st.one_of(
    st.integers(1, 80).map(lambda k: TopK(k=k)),
    st.builds(lambda ratio, least: TopK(ratio=ratio, min=least), st.floats(0.001, 1.0), st.integers(0, 30)),
    st.builds(lambda ratio, most: TopK(ratio=ratio, max=most), st.floats(0.001, 1.0), st.integers(1, 30)),
)
top_p: st.SearchStrategy[Policy] = st.builds(
    lambda p, least, more, steps: TopP(p, min=least, max=None if more is None else least + more, bisection_steps=steps),
    st.one_of(st.floats(0.0, 1.0), st.sampled_from([0.0, 0.5, 0.9, 1.0])),
    st.sampled_from([0, 0, 3, 20]),
    st.one_of(st.none(), st.integers(1, 40)),
    st.sampled_from([None, None, 1, 10]),
)
threshold: st.SearchStrategy[Policy] = any_score.map(lambda value: Threshold(0.0 if math.isnan(value) else value))


def rows_of(data: st.DataObject, values: st.SearchStrategy[float], shape: tuple[int, ...]) -> torch.Tensor:
    """Scores of a shape; drawn from few values as often as from many, so that ties decide."""
    count = math.prod(shape)
    if data.draw(st.booleans()):
        values = st.sampled_from(data.draw(st.lists(values, min_size=1, max_size=4)))
    return torch.tensor(data.draw(st.lists(values, min_size=count, max_size=count))).view(shape)


def call_of(scores: torch.Tensor, prefixes: list[int], policy: Policy, **arguments: object) -> SelectCall:
    """A call whose outputs are full of numbers that no selection writes."""
    prefix_lens = torch.tensor(prefixes, dtype=torch.int32, device=scores.device)
    call = select_call(scores, prefix_lens, policy, **arguments)  # pyright: ignore[reportArgumentType]
    for output in (call.indices, call.counts, call.slots):
        if output is not None:
            output.fill_(2**30)
    return call
