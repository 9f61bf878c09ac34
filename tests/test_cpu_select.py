"""The CPU's selection: exactly the oracle's sets, on ordinary and hostile scores, by every policy."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cases import poisoned
from select_cases import INFINITY, MASSES, NAN, SCORES, any_mass, any_score, call_of, rows_of, threshold, top_k, top_p
from specattn_codegen.build import cpu
from specattn_codegen.errors import SpecError
from specattn_codegen.heads import HeadConfig
from specattn_codegen.kernel import SelectCall
from specattn_codegen.plan import Plan
from specattn_codegen.policy import Policy, Threshold, TopK, TopP
from specattn_codegen.processors import cpu_info
from specattn_codegen.proof import reference
from specattn_codegen.proof.check import check_selection
from specattn_codegen.proof.problems import random_scores
from specattn_codegen.render import render
from specattn_codegen.results import Selection
from specattn_codegen.spec import KernelSpec

SPEC = KernelSpec(op="select_kv", heads=HeadConfig(num_q_heads=2, num_kv_heads=2, head_dim=8), selection="kv_head")
HERE = cpu_info.instruction_set()
TARGETS = [target for target in ("avx512", "avx2", "generic") if cpu_info.NEEDS[target] <= cpu_info.NEEDS[HERE]]
# A sample of 16 guesses badly, and on rows of 32 scores already, which small tests need; 1024 is what plans use.
KERNELS = [*((target, 16) for target in TARGETS), (HERE, 1024)]

ANY_INPUT = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module", params=KERNELS, ids=lambda p: f"{p[0]}-{p[1]}")
def kernel(request: pytest.FixtureRequest) -> cpu.CpuKernel:
    target, sampled = request.param
    return cpu.load(render(SPEC, Plan.of("cpu", sampled=sampled), target))


@pytest.fixture(scope="module")
def best() -> cpu.CpuKernel:
    """This processor's own kernel, where what is tested does not depend on the instruction set."""
    return cpu.load(render(SPEC, Plan.of("cpu", sampled=16), cpu_info.instruction_set()))


def select(
    kernel: cpu.CpuKernel, scores: torch.Tensor, prefixes: list[int], policy: Policy, **arguments: object
) -> SelectCall:
    call = call_of(scores, prefixes, policy, **arguments)
    kernel.launch(call, poisoned(kernel.workspace_bytes(call)))
    return call


@pytest.mark.parametrize("kind", ["k", "p", "threshold"])
@ANY_INPUT
@given(data=st.data())
def test_any_input(kernel: cpu.CpuKernel, kind: str, data: st.DataObject) -> None:
    policy = data.draw({"k": top_k, "p": top_p, "threshold": threshold}[kind])
    layers, batch, columns = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 2)), data.draw(st.integers(0, 130))
    block = data.draw(st.sampled_from([1, 1, 1, 4, 16]))
    prefixes = data.draw(st.lists(st.integers(-1, columns * block + 3), min_size=batch, max_size=batch))
    union = data.draw(st.sampled_from([1, 1, 3]))
    scores = rows_of(data, any_mass if kind == "p" else any_score, (layers, batch, 2 * union, columns))
    sink, recent = data.draw(st.integers(0, 9)) * block, data.draw(st.integers(0, 9)) * block
    call = select(kernel, scores, prefixes, policy, sink=sink, recent=recent, block=block, union=union)
    assert check_selection(call).passed, call


def hostile(rows: dict[str, Callable[[int], torch.Tensor]], columns: int) -> torch.Tensor:
    """Every kind of row as a request of its own, once as it is and once rolled."""
    made = torch.stack([make(columns) for make in rows.values()])
    return torch.stack([made, made.roll(7, dims=1)], dim=1)


@pytest.mark.parametrize("policy", [TopK(k=700), TopK(ratio=0.03), Threshold(0.25)], ids=str)
def test_long_hostile_rows(kernel: cpu.CpuKernel, policy: Policy) -> None:
    """Thousands of keys as large as the limit, floors guessed from a sample that misleads."""
    prefixes = [2_997] * len(SCORES)
    assert check_selection(select(kernel, hostile(SCORES, 3_001), prefixes, policy, sink=4, recent=64)).passed


SHARES = [TopP(0.95), TopP(1.0), TopP(0.5, min=900), TopP(0.9, max=300), TopP(0.97, bisection_steps=10)]


@pytest.mark.parametrize("policy", SHARES, ids=str)
def test_long_hostile_masses(kernel: cpu.CpuKernel, policy: TopP) -> None:
    prefixes = [2_997] * len(MASSES)
    assert check_selection(select(kernel, hostile(MASSES, 3_001), prefixes, policy, sink=4, recent=64)).passed


def test_a_million_ties_take_the_smallest_indices(kernel: cpu.CpuKernel) -> None:
    scores = torch.full((1, 1, 1_000_003), 0.5)
    chosen = select(kernel, scores, [1_000_003], TopK(k=2048))
    assert torch.equal(chosen.indices[0, 0], torch.arange(2048, dtype=torch.int32))


def test_a_million_equal_masses_are_counted(kernel: cpu.CpuKernel) -> None:
    chosen = select(kernel, torch.full((1, 1, 1_000_003), 0.1), [1_000_000], TopP(0.75))
    assert abs(int(chosen.counts) - 750_000) <= 1_000_000 * 2.0**-20 + 1
    assert int(chosen.indices[0, 0, int(chosen.counts) - 1]) == int(chosen.counts) - 1


def test_sums_that_pass_the_greatest_float_count(kernel: cpu.CpuKernel) -> None:
    scores = torch.full((1, 1, 4000), 3e38)
    scores[0, 0, 7] = 0.0
    chosen = select(kernel, scores, [4000], TopP(0.5))
    assert check_selection(chosen).passed
    assert 1999 <= int(chosen.counts) <= 2001


@pytest.mark.parametrize("bad", [NAN, INFINITY, -INFINITY, -1.0, -1e-45])
@pytest.mark.parametrize("place", [0, 700, 999])
def test_what_is_no_mass_is_refused(best: cpu.CpuKernel, bad: float, place: int) -> None:
    """Among the first forced keys, the free ones and the last forced; past the prefix it does not matter."""
    scores = torch.ones(2, 2, 1000)
    scores[1, 0, place] = bad
    with pytest.raises(SpecError, match="needs masses, finite and not negative"):
        select(best, scores, [1000, 1000], TopP(0.9), sink=2, recent=2)
    assert check_selection(select(best, scores, [1000, place], TopP(0.9), sink=2, recent=2)).passed


@pytest.mark.parametrize("shape", [(2,), (3, 1, 1), (3, 4, 2), (1,)])
def test_thresholds_of_their_own(best: cpu.CpuKernel, shape: tuple[int, ...]) -> None:
    scores = random_scores(12, 2, [300] * 12, 300, seed=5).view(3, 4, 2, 300)
    values = torch.rand(shape, generator=torch.Generator().manual_seed(6)) * 0.01
    values.view(-1)[-1] = NAN  # a head nobody calibrated: its rows are taken whole
    call = select(best, scores, [300, 0, 17, 299], Threshold(values), sink=1, recent=2)
    assert check_selection(call).passed
    assert int(call.counts[-1, -1, -1]) == 299


@ANY_INPUT
@given(data=st.data())
def test_a_histogram_changes_no_selection(kernel: cpu.CpuKernel, data: st.DataObject) -> None:
    """Even one of other scores, with forced keys in every bin."""
    policy, columns = data.draw(top_k), data.draw(st.integers(1, 130))
    scores = rows_of(data, any_mass, (2, 2, columns)) + 0.0  # weights have no negative zeros
    prefixes = data.draw(st.lists(st.integers(0, columns), min_size=2, max_size=2))
    counted = scores if data.draw(st.booleans()) else scores.flip(0)
    written = torch.arange(columns) < torch.tensor(prefixes)[:, None, None]
    histogram = reference.count_scores(torch.where(written, counted, NAN))
    call = select(kernel, scores, prefixes, policy, sink=3, recent=5, histogram=histogram)
    assert check_selection(call).passed, call


def test_rows_are_alike_on_any_number_of_threads(best: cpu.CpuKernel) -> None:
    """Enough scores that every thread is woken; a row's sums depend on the row alone."""
    scores = random_scores(64, 2, [3000] * 64, 3000, seed=7)
    threads = torch.get_num_threads()
    found: list[torch.Tensor] = []
    for number in (1, 2):
        torch.set_num_threads(number)
        try:
            found.append(select(best, scores, [3000] * 64, TopP(0.9)).indices)
        finally:
            torch.set_num_threads(threads)
    assert torch.equal(*found)


BAD_CALLS: dict[str, tuple[dict[str, object], str]] = {
    "five axes": ({"scores": torch.zeros(1, 1, 1, 1, 8)}, "at most 4 axes"),
    "block": ({"block": 0}, "block=0"),
    "slots of part of a block": (
        {"block": 3, "page_table": torch.zeros(1, 2, dtype=torch.int32), "page_size": 16},
        "3",
    ),
    "slot dtype": ({"page_table": torch.zeros(1, 2, dtype=torch.int32), "slot_dtype": torch.int16}, "slot_dtype"),
    "table batch": ({"page_table": torch.zeros(2, 2, dtype=torch.int32)}, "page_table has shape"),
    "threshold dtype": ({"policy": Threshold(torch.zeros(2).double())}, "torch.float32"),
    "threshold shape": ({"policy": Threshold(torch.zeros(3))}, "must broadcast"),
    "histogram of shares": (
        {"policy": TopP(0.5), "histogram": torch.zeros(1, 2, 1024, dtype=torch.int32)},
        "TopP has no use",
    ),
    "histogram shape": ({"histogram": torch.zeros(1, 2, 64, dtype=torch.int32)}, "histogram has shape"),
    "no slots in out": (
        {
            "page_table": torch.zeros(1, 2, dtype=torch.int32),
            "out": Selection(torch.zeros(1, 2, 8, dtype=torch.int32), torch.zeros(1, 2, dtype=torch.int32)),
        },
        "out.slots",
    ),
    "narrow out": (
        {"out": Selection(torch.zeros(1, 2, 1, dtype=torch.int32), torch.zeros(1, 2, dtype=torch.int32))},
        "may select 2",
    ),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_calls_are_refused(name: str) -> None:
    changes, words = BAD_CALLS[name]
    arguments: dict[str, object] = {"scores": torch.zeros(1, 2, 8), "prefixes": [8], "policy": TopK(k=2)} | changes
    with pytest.raises(SpecError, match=words):
        call_of(**arguments)  # pyright: ignore[reportArgumentType]
