"""Search spaces: the axes of a kernel's plan, its safe default, and the single statement of every constraint."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from types import ModuleType

from specattn_codegen.plan import Backend, Plan
from specattn_codegen.processors.arch import Arch
from specattn_codegen.space import cpu, tilelang, triton
from specattn_codegen.space.axis import Axis
from specattn_codegen.spec import KernelSpec

__all__ = [
    "Axis",
    "axes",
    "backends_for",
    "batch_invariant",
    "default_plan",
    "feasible",
    "for_mixed",
    "reentrant",
    "why_invalid",
    "why_unserved",
]

_SPACES: dict[Backend, ModuleType] = {"cpu": cpu, "triton": triton, "tilelang": tilelang}


def backends_for(arch: Arch) -> tuple[Backend, ...]:
    """Backends that serve a processor, the one to use without being asked first."""
    if not arch.is_gpu:
        return ("cpu",)
    return ("triton", "tilelang") if arch.vendor == "nvidia" else ("triton",)


def axes(spec: KernelSpec, backend: Backend) -> tuple[Axis, ...]:
    return _SPACES[backend].axes(spec)


def default_plan(spec: KernelSpec, arch: Arch, backend: Backend) -> Plan:
    """A plan that is valid on every architecture the backend serves, chosen for safety before speed."""
    return _SPACES[backend].default_plan(spec, arch)


def batch_invariant(plan: Plan) -> Plan:
    """The plan with splits of a fixed length, so that a row's result does not depend on its neighbours."""
    return _SPACES[plan.backend].batch_invariant(plan)


def for_mixed(plan: Plan, spec: KernelSpec, arch: Arch) -> Plan:
    """A plan of verify_attention for mixed_attention of the same heads, or the default one if it cannot serve that."""
    if plan.backend == "cpu":
        return plan
    adapted = triton.for_mixed(plan) if plan.backend == "triton" else None
    if adapted is not None and why_invalid(adapted, spec, arch) is None:
        return adapted
    return default_plan(spec, arch, "triton")


def reentrant(plan: Plan) -> Plan:
    """The plan without anything that its launches share, so that several streams may launch its kernel at once."""
    return triton.reentrant(plan) if plan.backend == "triton" else plan


def why_invalid(plan: Plan, spec: KernelSpec, arch: Arch) -> str | None:
    """The first rule the plan breaks, as a sentence; None for a plan that may be built."""
    reason = why_unserved(spec, arch, plan.backend)
    if reason is not None:
        return reason
    choices = {axis.name: axis.values for axis in axes(spec, plan.backend)}
    settings = plan.as_dict()
    if settings.keys() != choices.keys():
        return f"settings are {', '.join(settings)}; this space has {', '.join(choices)}"
    for name, value in settings.items():
        if value not in choices[name]:
            return f"{name}={value} is not one of {', '.join(map(str, choices[name]))}"
    return _SPACES[plan.backend].why_invalid(plan, spec, arch)


def why_unserved(spec: KernelSpec, arch: Arch, backend: Backend) -> str | None:
    """Why a backend has no plan for a kernel at all, with the nearest thing that serves it."""
    if backend not in backends_for(arch):
        return f"backend {backend} does not run on {arch.name}"
    return tilelang.why_unserved(spec) if backend == "tilelang" else None


def feasible(spec: KernelSpec, arch: Arch, backend: Backend) -> Iterator[Plan]:
    """Every valid plan, in the order of the axes."""
    return iter(_feasible(spec, arch, backend))


@functools.lru_cache(maxsize=2)  # a search ranks them and walks through them
def _feasible(spec: KernelSpec, arch: Arch, backend: Backend) -> tuple[Plan, ...]:
    if why_unserved(spec, arch, backend) is not None:
        return ()
    space = axes(spec, backend)
    names = [axis.name for axis in space]
    plans = (
        Plan.of(backend, **dict(zip(names, values, strict=True)))
        for values in itertools.product(*(axis.values for axis in space))
    )
    return tuple(plan for plan in plans if _SPACES[backend].why_invalid(plan, spec, arch) is None)
