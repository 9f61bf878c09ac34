"""The cost model's own choice, before anything is compiled: what serves where nobody tuned."""

from __future__ import annotations

import functools

from specattn_codegen import cost_model, space
from specattn_codegen.arch import Arch
from specattn_codegen.plan import Plan
from specattn_codegen.spec import KernelSpec, Workload

# A guessed gain below this is no reason to leave the safe default: registers and shared memory are guesses here too.
WORTHWHILE = 0.05


@functools.lru_cache(maxsize=256)
def first_choice(spec: KernelSpec, workload: Workload, arch: Arch) -> Plan:
    """The feasible plan predicted to be fastest on a GPU, or the default where that is nearly as fast."""
    backend = space.backends_for(arch)[0]

    def predicted_us(plan: Plan) -> float:
        guessed = cost_model.guess_resources(spec, plan, arch)
        if cost_model.why_unfit(guessed, arch) is not None:
            return float("inf")
        return cost_model.predict(spec, workload, plan, arch, guessed).latency_us

    default = space.default_plan(spec, arch, backend)
    times = {plan: predicted_us(plan) for plan in space.feasible(spec, arch, backend)}
    fastest = min(times, key=lambda plan: (times[plan], str(plan)))
    return fastest if times[fastest] < (1 - WORTHWHILE) * times[default] else default
