"""The cost model's own choice, before anything is compiled: what serves where nobody tuned."""

from __future__ import annotations

import functools
import math

from specattn_codegen import cost_model, space
from specattn_codegen.arch import Arch
from specattn_codegen.build.resources import Resources
from specattn_codegen.plan import Plan
from specattn_codegen.spec import KernelSpec, Workload

# A guessed gain below this is no reason to leave the safe default: registers and shared memory are guesses here too.
WORTHWHILE = 0.05


@functools.lru_cache(maxsize=16)
def _fitting(spec: KernelSpec, arch: Arch) -> dict[Plan, tuple[Resources, ...]]:
    """Feasible plans that should fit, and the resources they may take."""
    plans = space.feasible(spec, arch, space.backends_for(arch)[0])
    guessed = {plan: cost_model.guess_resources(spec, plan, arch) for plan in plans}
    return {plan: taken for plan, taken in guessed.items() if cost_model.why_unfit(taken, arch) is None}


@functools.lru_cache(maxsize=256)
def first_choice(spec: KernelSpec, workload: Workload, arch: Arch) -> Plan:
    """The feasible plan predicted to be fastest on a GPU, or the default where that is nearly as fast."""
    times = {
        plan: cost_model.predict(spec, workload, plan, arch, taken).latency_us
        for plan, taken in _fitting(spec, arch).items()
    }
    default = space.default_plan(spec, arch, space.backends_for(arch)[0])
    if not times:
        return default
    fastest = min(times, key=lambda plan: (times[plan], str(plan)))
    return fastest if times[fastest] < (1 - WORTHWHILE) * times.get(default, math.inf) else default
