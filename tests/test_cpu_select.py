"""The CPU's top-k selection: exactly the oracle's sets, on ordinary and hostile scores."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cases import poisoned
from specattn_codegen import cpu_info
from specattn_codegen.build import cpu
from specattn_codegen.calls import select_call
from specattn_codegen.check import check_selection
from specattn_codegen.heads import HeadConfig
from specattn_codegen.kernel import SelectCall
from specattn_codegen.plan import Plan
from specattn_codegen.policy import Policy, TopK
from specattn_codegen.problems import random_scores
from specattn_codegen.render import render
from specattn_codegen.results import Selection
from specattn_codegen.spec import KernelSpec

SPEC = KernelSpec(op="select_kv", heads=HeadConfig(num_q_heads=2, num_kv_heads=2, head_dim=8), selection="kv_head")
TARGETS = [target for target, needs in cpu_info.NEEDS.items() if needs <= cpu_info.NEEDS[cpu_info.instruction_set()]]
KERNELS = [(target, bits) for target in TARGETS for bits in (8, 11)]
SPECIAL = [0.0, -0.0, math.nan, math.inf, -math.inf, 1e-45, -1e-45, 1.0, 1.0, 2.0**-126]


@pytest.fixture(scope="module", params=KERNELS, ids=lambda p: f"{p[0]}-{p[1]}bits")
def kernel(request: pytest.FixtureRequest) -> cpu.CpuKernel:
    target, bits = request.param
    return cpu.load(render(SPEC, Plan.of("cpu", radix_bits=bits), target))


def select(
    kernel: cpu.CpuKernel, scores: torch.Tensor, prefixes: list[int], policy: Policy, sink: int, recent: int
) -> SelectCall:
    prefix_lens = torch.tensor(prefixes, dtype=torch.int32)
    call = select_call(scores, prefix_lens, policy, sink=sink, recent=recent)
    kernel.launch(call, poisoned(kernel.workspace_bytes(call)))
    return call


policies = st.one_of(
    st.integers(1, 80).map(lambda k: TopK(k=k)),
    st.builds(lambda ratio, least: TopK(ratio=ratio, min=least), st.floats(0.001, 1.0), st.integers(0, 30)),
    st.builds(lambda ratio, most: TopK(ratio=ratio, max=most), st.floats(0.001, 1.0), st.integers(1, 30)),
)
values = st.one_of(st.floats(width=32), st.sampled_from(SPECIAL))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_selection_equals_the_oracle_on_any_scores(kernel: cpu.CpuKernel, data: st.DataObject) -> None:
    columns = data.draw(st.integers(1, 70))
    prefixes = data.draw(st.lists(st.integers(-1, columns), min_size=1, max_size=3))
    row = st.lists(values, min_size=columns, max_size=columns)
    scores = torch.tensor(data.draw(st.lists(st.tuples(row, row), min_size=len(prefixes), max_size=len(prefixes))))
    policy, sink, recent = data.draw(policies), data.draw(st.integers(0, 9)), data.draw(st.integers(0, 9))
    call = select(kernel, scores, prefixes, policy, sink, recent)
    assert check_selection(call).passed, call


HOSTILE = {
    "all equal": lambda n: torch.full((n,), 0.25),
    "two values": lambda n: (torch.arange(n) % 3 == 0).float(),
    "one bucket": lambda n: 1.0 + torch.arange(n).flip(0).float() * 2.0**-23,
    "denormals": lambda n: (torch.randperm(n, generator=torch.Generator().manual_seed(0)) % 97).float() * 2.0**-149,
    "all minus infinity": lambda n: torch.full((n,), -math.inf),
    "ascending": lambda n: torch.arange(n).float(),
    "NaN among them": lambda n: torch.where(torch.arange(n) % 5 == 0, math.nan, torch.arange(n).float()),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_long_hostile_rows(kernel: cpu.CpuKernel, name: str) -> None:
    """Many thousands of keys in the bucket of the threshold: nothing may overflow."""
    row = HOSTILE[name](20_000)
    scores = torch.stack([row, row.roll(7)])[None]
    assert check_selection(select(kernel, scores, [19_997], TopK(k=1500), 4, 64)).passed


def test_values_are_those_of_torch_topk(kernel: cpu.CpuKernel) -> None:
    scores = random_scores(2, 2, [5000, 4000], 5000, seed=1)
    chosen = select(kernel, scores, [5000, 4000], TopK(k=300), 0, 0)
    for request, prefix in enumerate((5000, 4000)):
        for row in range(2):
            mine = scores[request, row, chosen.indices[request, row].long()].sort().values
            assert torch.equal(mine, scores[request, row, :prefix].topk(300).values.sort().values)


def test_a_million_ties_take_the_smallest_indices(kernel: cpu.CpuKernel) -> None:
    scores = torch.full((1, 1, 1_000_003), 0.5)
    chosen = select(kernel, scores, [1_000_003], TopK(k=2048), 0, 0)
    assert torch.equal(chosen.indices[0, 0], torch.arange(2048, dtype=torch.int32))


def test_strided_scores_and_padded_outputs(kernel: cpu.CpuKernel) -> None:
    """Rows wider than the scores that count, and an output wider than the selection."""
    wide = random_scores(2, 4, [100, 60], 200, seed=2)
    scores = wide[:, ::2, :128]
    out = Selection(torch.full((2, 2, 50), 7, dtype=torch.int32), torch.full((2, 2), 7, dtype=torch.int32))
    prefix_lens = torch.tensor([100, 60], dtype=torch.int32)
    call = select_call(scores, prefix_lens, TopK(k=20), out=out)
    kernel.launch(call, poisoned(kernel.workspace_bytes(call)))
    assert check_selection(call).passed
