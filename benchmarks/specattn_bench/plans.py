"""Which plan a kernel is timed with: what a pack has for it, the safe default, and what the command line overrides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from specattn_codegen import paths, space
from specattn_codegen.build.resources import Resources
from specattn_codegen.errors import SpecError
from specattn_codegen.packs import ladder
from specattn_codegen.plan import Plan, Setting
from specattn_codegen.processors.arch import Arch
from specattn_codegen.spec import KernelSpec, Workload

PlanSource = Literal["tuned", "default"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """A plan and how it was found: the rung of its ladder, and `overridden` on top of any.

    resources  of its binary where the pack entry has them; empty otherwise
    """

    plan: Plan
    found: str
    resources: tuple[Resources, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plans:
    """Where plans come from, and the settings that the command line fixes in all of them."""

    source: PlanSource
    overrides: Mapping[str, Setting]

    def require_known(self, specs: Sequence[KernelSpec], arch: Arch) -> None:
        """Every override must be an axis of at least one of the kernels. Raises SpecError."""
        backend = space.backends_for(arch)[0]
        known = dict.fromkeys(axis.name for spec in specs for axis in space.axes(spec, backend))
        for name in self.overrides:
            if name not in known:
                raise SpecError(f"--plan {name}: no such setting on {arch.name}; there are {', '.join(known)}")


DEFAULT = Plans(source="default", overrides={})


class NotServedError(SpecError):
    """A kernel that a backend does not make, whatever the plan."""


def parse_overrides(settings: Sequence[str]) -> dict[str, Setting]:
    """`key_tile=64` -> {"key_tile": 64}. Raises SpecError."""
    overrides: dict[str, Setting] = {}
    for text in settings:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise SpecError(f"--plan {text!r}: must be name=value, as in --plan key_tile=64")
        overrides[name] = int(value) if value.isdecimal() else value
    return overrides


def choose(spec: KernelSpec, workload: Workload, arch: Arch, plans: Plans) -> Chosen:
    """As dispatch chooses, or the default plan; then the overrides. A mixed batch takes the plan of its verifying
    requests.

    Raises NotServedError where the backend has no plan for `spec` at all, SpecError where the overrides make a bad one.
    """
    _require_served(spec, arch)
    if plans.source == "tuned":
        tuned = replace(spec, op="verify_attention", selection=None) if spec.op == "mixed_attention" else spec
        packs = ladder.read(arch, spec.heads, paths.pack_layers())
        found = packs.tuned(tuned, workload) or packs.find(spec, workload)
        resources = found.candidate.entry.resources if found.candidate else ()
        chosen = Chosen(plan=found.plan, found=found.rung, resources=resources)
    else:
        plan = space.default_plan(spec, arch, space.backends_for(arch)[0])
        chosen = Chosen(plan=plan, found="default", resources=())
    settings = chosen.plan.as_dict()
    changes = {name: value for name, value in plans.overrides.items() if name in settings and settings[name] != value}
    if changes:
        chosen = Chosen(plan=chosen.plan.replace(**changes), found=f"{chosen.found}, overridden", resources=())
    reason = space.why_invalid(chosen.plan, spec, arch)
    if reason is not None:
        raise SpecError(f"{spec.name}: {reason}")
    return chosen


def _require_served(spec: KernelSpec, arch: Arch) -> None:
    try:
        plan = space.default_plan(spec, arch, space.backends_for(arch)[0])
    except SpecError as error:
        raise NotServedError(str(error)) from error
    reason = space.why_invalid(plan, spec, arch)
    if reason is not None:
        raise NotServedError(reason)
