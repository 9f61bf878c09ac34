"""The cost model's own choice among plans that are proved, for sizes that nobody tuned."""

from __future__ import annotations

from collections.abc import Iterable

from specattn_codegen import cost_model, space
from specattn_codegen.plan import Plan
from specattn_codegen.processors.arch import Arch
from specattn_codegen.spec import KernelSpec, Workload

# A gain below this is no reason to leave the safe default. Resources are guessed, since what a pack says of a binary
# may be anything.
WORTHWHILE = 0.05


def best_proved(spec: KernelSpec, workload: Workload, arch: Arch, proved: Iterable[Plan]) -> Plan | None:
    """The plan predicted to be fastest on a GPU; None where none fits or the safe default is nearly as fast."""
    default = space.default_plan(spec, arch, space.backends_for(arch)[0])
    taken = {plan: cost_model.guess_resources(spec, plan, arch) for plan in (default, *proved)}
    times = {
        plan: cost_model.latency_us(spec, workload, plan, arch, resources)
        for plan, resources in taken.items()
        if plan == default or cost_model.why_unfit(resources, arch) is None
    }
    fastest = min(times, key=lambda plan: (times[plan], str(plan)))
    return fastest if times[fastest] < (1 - WORTHWHILE) * times[default] else None
