"""What select_kv promises for any scores, on every backend.

Properties by number, and what holds each; `cpu:` is tests/test_cpu_select.py, `triton:` test_triton_select.py,
`oracle:` test_reference_select.py, and every backend is held against that oracle there; TileLang by its twin in C,
which test_tilelang_select.py tests as well.

21  values are those of torch.topk       test_values_are_those_of_torch_topk
                                         cpu: test_long_hostile_rows, test_a_million_ties_take_the_smallest_indices
22  small indices first, ascending       test_ties_go_to_the_smaller_index
                                         cpu: test_rows_are_alike_on_any_number_of_threads
23  short and empty prefixes             test_a_prefix_within_the_budget_is_taken_whole
24  each row's own budget and length     test_rows_have_budgets_and_lengths_of_their_own
25  forced keys, once, in the budget     test_forced_keys_are_kept_once_and_inside_the_budget
                                         test_no_mass_gives_the_forced_and_the_newest_keys
26  slots                                test_physical_slots, test_slots_of_a_large_pool_take_64_bits
27  counts                               test_forced_keys_are_kept_once_and_inside_the_budget
                                         tests/test_sparse_properties.py
28  nothing is kept between launches     test_a_workspace_may_hold_an_earlier_launch
                                         triton: test_rows_shared_by_several_blocks
29  scores are float32                   test_scores_of_other_types_are_refused
30  shares of the mass                   test_a_share_is_reached_by_no_key_too_many, test_shares_are_nested
                                         test_a_share_knows_no_unit, cpu: test_what_is_no_mass_is_refused
                                         oracle: test_top_p_is_the_smallest_superset_of_the_forced_keys

and unions over rows: test_a_union_*
"""

from __future__ import annotations

import importlib
import itertools
import math
from dataclasses import dataclass
from typing import Literal, get_args

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cases import poisoned
from select_cases import SCORES, any_mass, any_score, call_of, rows_of, threshold, top_k, top_p
from specattn_codegen.build import cpu, triton
from specattn_codegen.errors import SpecError
from specattn_codegen.heads import HeadConfig
from specattn_codegen.kernel import Kernel, SelectCall
from specattn_codegen.plan import Plan
from specattn_codegen.policy import MASS_TOLERANCE, Policy, Threshold, TopK, TopP
from specattn_codegen.processors import cpu_info
from specattn_codegen.proof import reference
from specattn_codegen.proof.check import check_selection
from specattn_codegen.proof.problems import random_scores
from specattn_codegen.render import render
from specattn_codegen.results import Selection
from specattn_codegen.spec import KernelSpec
from triton_cases import DEVICE

Backend = Literal["cpu", "triton", "tilelang"]
SPEC = KernelSpec(op="select_kv", heads=HeadConfig(num_q_heads=2, num_kv_heads=2, head_dim=8), selection="kv_head")
ANY_INPUT = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@dataclass(frozen=True, slots=True, kw_only=True)
class Selector:
    """A kernel, and the columns of a long row: as many as it goes over in a moment, where Triton is interpreted."""

    kernel: Kernel
    device: torch.device
    columns: int

    def call(self, scores: torch.Tensor, prefixes: list[int], policy: Policy, **arguments: object) -> SelectCall:
        moved = {
            name: value.to(self.device) if isinstance(value, torch.Tensor) else value
            for name, value in arguments.items()
        }
        return call_of(scores.to(self.device), prefixes, policy, **moved)

    def __call__(self, scores: torch.Tensor, prefixes: list[int], policy: Policy, **arguments: object) -> SelectCall:
        """A call, launched on a workspace of NaN bit patterns."""
        call = self.call(scores, prefixes, policy, **arguments)
        self.kernel.launch(call, poisoned(self.kernel.workspace_bytes(call)).to(self.device))
        return call


def selector(backend: Backend) -> Selector:
    """Small samples and tiles, so that short rows have what long ones have."""
    if backend == "cpu":
        kernel: Kernel = cpu.load(render(SPEC, Plan.of("cpu", sampled=16), cpu_info.instruction_set()))
        return Selector(kernel=kernel, device=torch.device("cpu"), columns=3001)
    if backend == "tilelang":
        pytest.importorskip("tilelang", reason="TileLang is not installed")
        twin = importlib.import_module("tilelang_cases").select_twin()
        return Selector(kernel=twin, device=torch.device("cpu"), columns=601)
    plan = Plan.of("triton", block_n=64, num_warps=4, radix_bits=8, max_splits=4)
    return Selector(kernel=triton.load(render(SPEC, plan, "triton")), device=DEVICE, columns=90)


@pytest.fixture(scope="module", params=get_args(Backend))
def select(request: pytest.FixtureRequest) -> Selector:
    return selector(request.param)


@pytest.fixture(scope="module")
def select_on_cpu() -> Selector:
    """For the many inputs that Triton's interpreter would take minutes for."""
    return selector("cpu")


def chosen(call: SelectCall) -> list[list[int]]:
    """The indices that each row's count covers; what is past them is -1."""
    counts = call.counts.flatten().tolist()
    rows = call.indices.flatten(0, -2).tolist()
    assert all(set(row[count:]) <= {-1} for row, count in zip(rows, counts, strict=True))
    return [row[:count] for row, count in zip(rows, counts, strict=True)]


def test_values_are_those_of_torch_topk(select: Selector) -> None:
    """Where scores are equal or both zero, any of them; NaN, which torch takes first, is below every score here."""
    rows = [name for name in SCORES if "NaN" not in name]
    scores = torch.stack([SCORES[name](select.columns) for name in rows])[:, None]
    call = select(scores, [select.columns] * len(rows), TopK(k=select.columns // 4))
    values = scores.gather(-1, call.indices.cpu().long()).sort().values
    assert torch.equal(values, scores.topk(select.columns // 4).values.sort().values)
    assert all(row == sorted(set(row)) for row in chosen(call))
    with_nan = torch.tensor([[[math.nan, 1.0, -math.inf, math.nan, -2.0]]])
    assert chosen(select(with_nan, [5], TopK(k=4))) == [[0, 1, 2, 4]]


def test_ties_go_to_the_smaller_index(select: Selector) -> None:
    """Also where they span blocks of a row; +0 and -0 are equal, and denormals are not."""
    scores = torch.full((1, 1, 300), 0.5)
    scores[0, 0, 280] = 1.0
    assert chosen(select(scores, [300], TopK(k=200))) == [[*range(199), 280]]
    scores = torch.where(torch.arange(300) % 2 == 0, -0.0, 0.0)
    scores[100], scores[290] = -(2.0**-149), 2.0**-149
    assert chosen(select(scores.view(1, 1, 300), [300], TopK(k=150))) == [[*range(100), *range(101, 150), 290]]


@pytest.mark.parametrize("policy", [TopK(k=50), TopK(ratio=0.01, min=50), Threshold(-math.inf)], ids=str)
def test_a_prefix_within_the_budget_is_taken_whole(select: Selector, policy: Policy) -> None:
    prefixes = [50, 49, 1, 0, -7]
    call = select(random_scores(5, 1, prefixes, 60, seed=1), prefixes, policy)
    assert chosen(call) == [list(range(max(0, prefix))) for prefix in prefixes]


def test_rows_have_budgets_and_lengths_of_their_own(select: Selector) -> None:
    """A share of each prefix, rows wider than the scores that count, and an output wider than the selection."""
    wide = random_scores(3, 4, [100, 37, 8], 150, seed=2)
    out = Selection(torch.empty(3, 2, 50, dtype=torch.int32), torch.empty(3, 2, dtype=torch.int32))
    out = Selection(out.indices.to(select.device), out.counts.to(select.device))
    call = select(wide.to(select.device)[:, ::2, :110], [100, 37, 8], TopK(ratio=0.13, min=2), out=out)
    assert check_selection(call).passed
    assert out.counts.tolist() == [[13, 13], [5, 5], [2, 2]]


def check_forced(call: SelectCall, prefix: int) -> None:
    forced = {key for key in range(prefix) if key < call.sink or key >= prefix - call.recent}
    for keys in chosen(call):
        assert keys == sorted(set(keys))
        assert forced <= set(keys)
        if isinstance(call.policy, TopK):
            assert len(keys) == max(call.policy.budget(prefix), len(forced))
        elif isinstance(call.policy, TopP):
            assert len(keys) <= max(call.policy.most_keys(prefix), len(forced))


@ANY_INPUT
@given(data=st.data(), policy=st.one_of(top_k, top_p, threshold), columns=st.integers(1, 90))
def test_forced_keys_are_kept_once_and_inside_the_budget(
    select_on_cpu: Selector, data: st.DataObject, policy: Policy, columns: int
) -> None:
    prefix, sink, recent = (
        data.draw(st.integers(0, columns)),
        data.draw(st.integers(0, 99)),
        data.draw(st.integers(0, 99)),
    )
    scores = rows_of(data, any_mass if isinstance(policy, TopP) else any_score, (1, 2, columns))
    check_forced(select_on_cpu(scores, [prefix], policy, sink=sink, recent=recent), prefix)


@pytest.mark.parametrize("policy", [TopK(k=12), TopK(k=3), TopP(0.9, max=11)], ids=str)
def test_forced_keys_of_every_backend(select: Selector, policy: Policy) -> None:
    """Inside the budget, and where they pass it."""
    check_forced(select(random_scores(1, 1, [70], 80, seed=3), [70], policy, sink=4, recent=6), 70)


@pytest.mark.parametrize("slot_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("block", [1, 4])
def test_physical_slots(select: Selector, slot_dtype: torch.dtype, block: int) -> None:
    """A table with wild and negative entries, too short for the longest request."""
    scores = random_scores(2, 1, [120, 90], 120, seed=3)
    table = torch.randint(-3, 1000, (2, 40), generator=torch.Generator().manual_seed(4), dtype=torch.int32)
    arguments = {"block": block, "page_table": table[:, :8], "page_size": 12, "slot_dtype": slot_dtype}
    call = select(scores, [120 * block, 90 * block], TopK(ratio=0.5), sink=3, recent=5, **arguments)
    assert call.slots is not None
    assert call.slots.dtype == slot_dtype
    assert check_selection(call).passed
    assert (call.slots[0] == -1).any()


def test_slots_of_a_large_pool_take_64_bits(select: Selector) -> None:
    table, scores = torch.tensor([[2**31 - 1]], dtype=torch.int32), torch.ones(1, 1, 16)
    call = select(scores, [16], TopK(k=1), page_table=table, page_size=16, slot_dtype=torch.int64)
    assert call.slots is not None
    assert call.slots.item() == (2**31 - 1) * 16


def test_a_workspace_may_hold_an_earlier_launch(select: Selector) -> None:
    """Nothing is reset between launches: a captured graph replays on what it left."""
    scores = random_scores(1, 2, [240], 240, seed=7)
    calls = [select.call(scores[:, :1], [240], policy) for policy in (TopP(0.9, max=50), TopK(k=30))]
    calls.append(select.call(scores, [240], Threshold(0.01), union=2))
    size = max(select.kernel.workspace_bytes(call) for call in calls)
    workspace = torch.empty(size, dtype=torch.uint8, device=select.device)
    for place in (2, 0, 1, 2):
        for output in (calls[place].indices, calls[place].counts):
            output.fill_(2**30)
        select.kernel.launch(calls[place], workspace)
        assert check_selection(calls[place]).passed


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_scores_of_other_types_are_refused(dtype: torch.dtype) -> None:
    """Rounded scores would tie where weights differ, so that nothing is rounded unsaid."""
    with pytest.raises(SpecError, match=rf"scores is {dtype}: must be torch.float32; convert it"):
        call_of(torch.zeros(1, 1, 8, dtype=dtype), [8], TopK(k=2))


@ANY_INPUT
@given(data=st.data(), p=st.floats(0.0, 1.0), columns=st.integers(1, 120))
def test_a_share_is_reached_by_no_key_too_many(
    select_on_cpu: Selector, data: st.DataObject, p: float, columns: int
) -> None:
    """What is selected reaches the share, and without its least free key it does not; no key left out is larger."""
    sink, recent = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 3))
    scores = rows_of(data, any_mass, (1, 1, columns))
    (keys,) = chosen(select_on_cpu(scores, [columns], TopP(p), sink=sink, recent=recent))
    row, free = scores[0, 0].double(), [key for key in keys if sink <= key < columns - recent]
    slack = MASS_TOLERANCE * float(row.sum())
    assert float(row[keys].sum()) >= p * float(row.sum()) - slack
    if free:
        least = min(free, key=lambda key: (float(row[key]), -key))
        assert row[least] > 0
        assert p == 1.0 or float(row[keys].sum() - row[least]) < p * float(row.sum()) + slack
        assert all((row[key], -key) < (row[least], -least) for key in set(range(columns)) - set(keys))


@ANY_INPUT
@given(data=st.data(), columns=st.integers(1, 120), least=st.integers(0, 9), more=st.integers(1, 60))
def test_shares_are_nested(select_on_cpu: Selector, data: st.DataObject, columns: int, least: int, more: int) -> None:
    """From none, which leaves the forced keys and `min`, to all, which leaves out only keys without mass."""
    scores = rows_of(data, any_mass, (1, 1, columns))
    shares = [0.0, 1 / 16, 0.5, 0.95, 1.0]
    found = [set(chosen(select_on_cpu(scores, [columns], TopP(p, min=least)))[0]) for p in shares]
    assert all(fewer <= some for fewer, some in itertools.pairwise(found))
    positive = int((scores > 0).sum())
    assert len(found[0]) == min(least, columns)
    assert len(found[-1]) == max(positive, min(least, columns))
    (bounded,) = chosen(select_on_cpu(scores, [columns], TopP(0.95, min=least, max=least + more)))
    assert len(bounded) == min(max(len(found[3]), min(least, columns)), least + more)


@ANY_INPUT
@given(data=st.data(), exponent=st.integers(-30, 60), p=st.floats(0.0, 1.0))
def test_a_share_knows_no_unit(select_on_cpu: Selector, data: st.DataObject, exponent: int, p: float) -> None:
    """Masses need not sum up to 1; a power of two changes no rounding."""
    scores = rows_of(data, st.floats(2.0**-60, 2.0**60, width=32), (1, 1, 100))
    assert chosen(select_on_cpu(scores, [100], TopP(p))) == chosen(
        select_on_cpu(scores * 2.0**exponent, [100], TopP(p))
    )


def test_no_mass_gives_the_forced_and_the_newest_keys(select: Selector) -> None:
    scores = torch.zeros(1, 1, 60)
    assert chosen(select(scores, [50], TopP(0.9, min=12), sink=2, recent=3)) == [[0, 1, *range(40, 50)]]


@pytest.mark.parametrize("kind", ["k", "p", "threshold"])
@ANY_INPUT
@given(data=st.data())
def test_a_union_holds_what_any_of_its_rows_selects(select_on_cpu: Selector, kind: str, data: st.DataObject) -> None:
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
def test_a_union_is_the_union_of_the_selections_apart(select: Selector, policy: Policy) -> None:
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
