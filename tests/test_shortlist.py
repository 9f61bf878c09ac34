"""The plans tried first where time is short."""

from __future__ import annotations

import itertools

import pytest

from specattn_codegen import space
from specattn_codegen.cost_model import guess_resources, predict
from specattn_codegen.heads import HeadConfig
from specattn_codegen.plan import Plan
from specattn_codegen.processors import cpu_info, gpus
from specattn_codegen.spec import KernelSpec, Workload
from specattn_codegen.tuning.shortlist import LEAST_DIFFERENCES, Shortlisted, ranked, shortlist

HEADS = HeadConfig(num_q_heads=8, num_kv_heads=2, head_dim=64)
SPARSE = KernelSpec(op="sparse_attention", heads=HEADS, dtype="bfloat16", page_size=16, selection="kv_head")
WORKLOAD = Workload(batch=4, q_len=1, kv_len=32768, budget=2000)
H200 = gpus.find("h200")


def predicted_us(plan: Plan) -> float:
    return predict(SPARSE, WORKLOAD, plan, H200, guess_resources(SPARSE, plan, H200)).latency_us


def test_the_default_is_followed_by_the_models_best_that_are_no_neighbours() -> None:
    order = ranked(SPARSE, WORKLOAD, H200, "triton")
    assert list(map(predicted_us, order)) == sorted(map(predicted_us, order))
    assert set(order) == set(space.feasible(SPARSE, H200, "triton"))
    chosen = shortlist(SPARSE, WORKLOAD, H200, "triton", count=8)
    assert len(set(chosen)) == 8
    assert chosen[0] == space.default_plan(SPARSE, H200, "triton")
    for first, second in itertools.combinations(chosen, 2):
        differences = sum(first[name] != second[name] for name, _ in first.settings)
        assert differences >= LEAST_DIFFERENCES
    assert list(map(predicted_us, chosen[1:])) == sorted(map(predicted_us, chosen[1:]))


@pytest.mark.parametrize("count", [1, 3, 1000])
def test_a_small_space_is_listed_whole_and_never_twice(count: int) -> None:
    spec = KernelSpec(op="select_kv", heads=HEADS, selection="kv_head")
    arch = cpu_info.detect(measure=False)
    chosen = shortlist(spec, WORKLOAD, arch, "cpu", count=count)
    assert len(chosen) == len(set(chosen)) == min(count, len(list(space.feasible(spec, arch, "cpu"))))
    assert chosen[0] == space.default_plan(spec, arch, "cpu")


def test_a_list_is_proposed_in_its_order_and_once() -> None:
    plans = shortlist(SPARSE, WORKLOAD, H200, "triton", count=5)
    search = Shortlisted(plans)
    assert search.left == 5
    assert search.ask(2) == plans[:2]
    search.tell(plans[0], None)
    assert search.ask(9) == plans[2:]
    assert search.ask(1) == []
    assert search.left == 0
