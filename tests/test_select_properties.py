"""What select_kv promises for any scores, on every backend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cases import poisoned
from select_cases import any_mass, any_score, call_of, rows_of, threshold, top_k, top_p
from specattn_codegen import cpu_info, reference
from specattn_codegen.build import cpu, triton
from specattn_codegen.check import check_selection
from specattn_codegen.errors import SpecError
from specattn_codegen.heads import HeadConfig
from specattn_codegen.kernel import Kernel, SelectCall
from specattn_codegen.plan import Plan
from specattn_codegen.policy import Policy, Threshold, TopK
from specattn_codegen.problems import random_scores
from specattn_codegen.render import render
from specattn_codegen.spec import KernelSpec
from triton_cases import DEVICE

Backend = Literal["cpu", "triton"]
SPEC = KernelSpec(op="select_kv", heads=HeadConfig(num_q_heads=2, num_kv_heads=2, head_dim=8), selection="kv_head")
ANY_INPUT = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

Select = Callable[..., SelectCall]


def kernel_of(backend: Backend) -> Kernel:
    """Small samples and tiles, so that short rows have what long ones have."""
    if backend == "cpu":
        return cpu.load(render(SPEC, Plan.of("cpu", sampled=16), cpu_info.instruction_set()))
    plan = Plan.of("triton", block_n=64, num_warps=4, radix_bits=8, max_splits=4)
    return triton.load(render(SPEC, plan, "triton"))


@pytest.fixture(params=get_args(Backend))
def select(request: pytest.FixtureRequest) -> Select:
    """A call, launched on a workspace of NaN bit patterns."""
    return selector(request.param)


@pytest.fixture
def select_on_cpu() -> Select:
    """For the many inputs that Triton's interpreter would take minutes for."""
    return selector("cpu")


def selector(backend: Backend) -> Select:
    kernel = kernel_of(backend)
    device = DEVICE if backend == "triton" else torch.device("cpu")

    def select(scores: torch.Tensor, prefixes: list[int], policy: Policy, **arguments: object) -> SelectCall:
        moved = {
            name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in arguments.items()
        }
        call = call_of(scores.to(device), prefixes, policy, **moved)
        kernel.launch(call, poisoned(kernel.workspace_bytes(call)).to(device))
        return call

    return select


@pytest.mark.parametrize("kind", ["k", "p", "threshold"])
@ANY_INPUT
@given(data=st.data())
def test_a_union_holds_what_any_of_its_rows_selects(select_on_cpu: Select, kind: str, data: st.DataObject) -> None:
    policy = data.draw({"k": top_k, "p": top_p, "threshold": threshold}[kind])
    union, columns, block = (
        data.draw(st.integers(2, 5)),
        data.draw(st.integers(1, 90)),
        data.draw(st.sampled_from([1, 4])),
    )
    prefixes = data.draw(st.lists(st.integers(-1, columns * block + 3), min_size=2, max_size=2))
    scores = rows_of(data, any_mass if kind == "p" else any_score, (2, 2 * union, columns))
    call = select_on_cpu(scores, prefixes, policy, sink=3 * block, recent=5 * block, block=block, union=union)
    assert call.indices.shape[1] == 2
    assert check_selection(call).passed, call


@pytest.mark.parametrize("policy", [TopK(k=9), Threshold(0.01)], ids=str)
def test_a_union_is_the_union_of_the_selections_apart(select: Select, policy: Policy) -> None:
    """Layers, forced keys, slots, and a request without a prefix."""
    scores = random_scores(2 * 2, 2, [100, 0, 100, 0], 110, seed=1).view(2, 2, 2, 110)
    table = torch.randperm(20, generator=torch.Generator().manual_seed(2)).int().view(2, 10)
    forced = {"sink": 2, "recent": 3}
    apart = select(scores, [100, 0], policy, **forced)
    united = select(scores, [100, 0], policy, union=2, page_table=table, page_size=10, slot_dtype=torch.int64, **forced)
    assert check_selection(united).passed
    for layer in range(2):
        expected = sorted(set(apart.indices[layer, 0].flatten().tolist()) - {-1})
        assert united.indices[layer, 0, 0, : len(expected)].tolist() == expected
        assert united.counts[layer].tolist() == [[len(expected)], [0]]


def test_unions_of_part_of_a_request_are_refused() -> None:
    for union in (0, 4):
        with pytest.raises(SpecError, match=rf"union={union}: must be at least 1 and divide the 6 score rows"):
            call_of(torch.zeros(1, 6, 8), [8], TopK(k=2), union=union)


def test_no_union_is_wider_than_its_capacity() -> None:
    """Rows with nothing in common fill union * k columns, and no union holds more than the columns there are."""
    scores = torch.eye(4).repeat_interleave(3, dim=1).view(1, 4, 12)
    chosen = reference.select_kv(scores, torch.tensor([12]), TopK(k=3), union=4)
    assert chosen.indices.shape == call_of(scores, [12], TopK(k=3), union=4).indices.shape == (1, 1, 12)
    assert call_of(scores[..., :7], [7], TopK(k=3), union=4).indices.shape == (1, 1, 7)
