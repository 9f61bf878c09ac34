"""Several backends in one search: which of them serve a kernel, and whose plan is next."""

from __future__ import annotations

import dataclasses

from specattn_codegen import space
from specattn_codegen.heads import HeadConfig
from specattn_codegen.plan import Backend
from specattn_codegen.processors import gpus
from specattn_codegen.spec import KernelSpec
from specattn_codegen.tuning.by_backend import ByBackend
from specattn_codegen.tuning.search import Search, Strategy, space_of
from specattn_codegen.tuning.tune_session import Target

HEADS = HeadConfig(num_q_heads=8, num_kv_heads=2, head_dim=32)
VERIFY = KernelSpec(op="verify_attention", heads=HEADS, dtype="bfloat16", page_size=16)
H100 = gpus.find("h100")
EVERYTHING = Target(arch=H100, backend="triton", is_present=False, page_size=16, further=("tilelang",))


def searches(trials: int) -> dict[Backend, Search]:
    strategy = Strategy(sampler="tpe", trials=trials, seed=1)
    return {
        one.backend: Search(space_of(VERIFY, H100, one.backend), seeds=[], strategy=strategy)
        for one in EVERYTHING.each(VERIFY)
    }


def test_backends_take_turns_and_hear_of_their_own_plans() -> None:
    both, alone = ByBackend(searches(3)), searches(3)
    assert both.left == 6
    plans = both.ask(4)
    assert [plan.backend for plan in plans] == ["triton", "tilelang"] * 2
    assert plans[:2] == [space.default_plan(VERIFY, H100, backend) for backend in ("triton", "tilelang")]
    for index, plan in enumerate(plans):
        both.tell(plan, float(index))
    plans += both.ask(4)
    assert both.left == 0
    assert both.ask(4) == []
    assert both.heard() == []
    for backend, search in alone.items():
        asked = search.ask(2)
        for plan in asked:
            search.tell(plan, float(plans.index(plan)))
        assert asked + search.ask(2) == [plan for plan in plans if plan.backend == backend]
    both.close()


def test_a_kernel_that_a_further_backend_does_not_serve_is_searched_without_it() -> None:
    exact = dataclasses.replace(VERIFY, dtype="float32")
    assert [one.backend for one in EVERYTHING.each(exact)] == ["triton"]
    assert [one.backend for one in EVERYTHING.each(VERIFY)] == ["triton", "tilelang"]
