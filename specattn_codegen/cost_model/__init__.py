"""Cost model: predicts a plan's time, on an absent GPU from its binary. It ranks plans and proves no speed."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from specattn_codegen.build.resources import Resources
from specattn_codegen.cost_model.attention import Likeness, attention_launches, launch_makers
from specattn_codegen.cost_model.cpu import attention_terms, cpu_residency
from specattn_codegen.cost_model.floor import floor_us, least_work
from specattn_codegen.cost_model.grid import Launch, residency
from specattn_codegen.cost_model.hardware import LAUNCH_US
from specattn_codegen.cost_model.occupancy import why_unfit
from specattn_codegen.cost_model.prediction import Prediction, Residency, Term
from specattn_codegen.cost_model.selection import selection_launches
from specattn_codegen.cost_model.traffic import bytes_moved
from specattn_codegen.errors import SpecError
from specattn_codegen.plan import Backend, Plan
from specattn_codegen.processors.arch import Arch
from specattn_codegen.space import tilelang, triton
from specattn_codegen.spec import KernelSpec, Workload

__all__ = [
    "Prediction",
    "Residency",
    "Term",
    "covers",
    "floor_us",
    "guess_resources",
    "latencies_us",
    "latency_us",
    "predict",
    "why_unfit",
]

# Registers a thread for addresses, operands and loop state: as binaries of default plans take, on top of accumulators.
GUESSED_OVERHEAD = {"triton": 48, "tilelang": 144}
SCORES_HELD = 32  # of a thread of a selection, with which it spilled 0 to 32 bytes
SPILLED_BYTES = 28  # for every further one: with 64 it spilled 832 to 1000 bytes


def covers(spec: KernelSpec, backend: Backend) -> bool:
    """Whether the model ranks this kernel's plans before they are compiled."""
    return backend != "cpu" or spec.op != "select_kv"


def predict(
    spec: KernelSpec, workload: Workload, plan: Plan, arch: Arch, resources: tuple[Resources, ...]
) -> Prediction:
    """Predicted time of one call, one term per launch and one for the launches themselves."""
    if plan.backend == "cpu" and not arch.is_gpu:
        return _predict_cpu(spec, workload, plan, arch)
    launches = _launches(spec, workload, plan, arch, resources)
    terms = _fitted(_terms(launches, arch), arch)
    latency = sum(term.microseconds for term in terms)
    return Prediction(
        latency_us=latency,
        terms=terms,
        share_of_ceiling=min(1.0, floor_us(spec, workload, arch) / latency),
        bytes_moved=bytes_moved(spec, workload, plan, arch),
        bytes_least=least_work(spec, workload).memory_bytes,
        residency=residency(launches[0], arch),
    )


def latency_us(spec: KernelSpec, workload: Workload, plan: Plan, arch: Arch, resources: tuple[Resources, ...]) -> float:
    """That of the prediction, in half the time."""
    if plan.backend == "cpu" and not arch.is_gpu:
        return _predict_cpu(spec, workload, plan, arch).latency_us
    terms = _terms(_launches(spec, workload, plan, arch, resources), arch)
    return sum(term.microseconds for term in _fitted(terms, arch))


def latencies_us(
    spec: KernelSpec, workload: Workload, taken: Mapping[Plan, tuple[Resources, ...]], arch: Arch
) -> dict[Plan, float]:
    """latency_us of thousands of plans, in a tenth of the time: a launch that plans share is worked out once."""
    if not arch.is_gpu or spec.op == "select_kv":
        return {plan: latency_us(spec, workload, plan, arch, resources) for plan, resources in taken.items()}
    known: dict[Likeness, tuple[Term, bool]] = {}
    times: dict[Plan, float] = {}
    for plan, resources in taken.items():
        terms: list[Term] = []
        own = 0
        for likeness, make in launch_makers(spec, workload, plan, arch, resources):
            if likeness not in known:
                launch = make()
                (term,) = _fitted((launch.term(arch.num_sms),), arch)
                known[likeness] = term, launch.within
            term, within = known[likeness]
            terms.append(term)
            own += not within
        terms += _fitted((_overhead(own),), arch)
        times[plan] = sum(term.microseconds for term in terms)
    return times


def _launches(
    spec: KernelSpec, workload: Workload, plan: Plan, arch: Arch, resources: tuple[Resources, ...]
) -> tuple[Launch, ...]:
    if plan.backend == "cpu" or not arch.is_gpu:
        raise SpecError(f"the cost model knows no {plan.backend} on {arch.name}; measure it instead")
    if spec.op == "select_kv":
        return selection_launches(spec, workload, plan, arch, resources[0])
    return attention_launches(spec, workload, plan, arch, resources)


def _terms(launches: tuple[Launch, ...], arch: Arch) -> tuple[Term, ...]:
    own = sum(not launch.within for launch in launches)
    return (*(launch.term(arch.num_sms) for launch in launches), _overhead(own))


def _overhead(launches: int) -> Term:
    return Term(name="launches", microseconds=LAUNCH_US * launches, limit="launch")


def _fitted(terms: tuple[Term, ...], arch: Arch) -> tuple[Term, ...]:
    """Times what measurements on this processor made of their limits."""
    if not arch.fit:
        return terms
    factors = dict(arch.fit)
    return tuple(
        dataclasses.replace(term, microseconds=term.microseconds * factors.get(term.limit, 1.0)) for term in terms
    )


def _predict_cpu(spec: KernelSpec, workload: Workload, plan: Plan, arch: Arch) -> Prediction:
    """Residency is of cores: those with a task, and the tiles they have under way."""
    if spec.op == "select_kv":
        raise SpecError("the cost model knows no select_kv on the CPU; measure it instead, there are few plans")
    terms = _fitted(attention_terms(spec, workload, plan, arch), arch)
    latency = sum(term.microseconds for term in terms)
    least = least_work(spec, workload).memory_bytes
    return Prediction(
        latency_us=latency,
        terms=terms,
        share_of_ceiling=min(1.0, floor_us(spec, workload, arch) / latency) if arch.bandwidth_gbs else 0.0,
        bytes_moved=least,
        bytes_least=least,
        residency=cpu_residency(spec, plan, arch),
    )


def guess_resources(spec: KernelSpec, plan: Plan, arch: Arch) -> tuple[Resources, ...]:
    """What the binary may take, before there is one: decides which plans are worth compiling first, nothing else.
    Nothing is known of a CPU's."""
    if plan.backend == "cpu":
        return ()
    if spec.op == "select_kv":
        return (_guess_selection(plan, arch),)
    tiles = tilelang if plan.backend == "tilelang" else triton
    registers = min(255, tiles.accumulator_registers(plan, spec, arch) + GUESSED_OVERHEAD[plan.backend])
    attend = _guess("attend_splits", registers=registers, smem_bytes=tiles.smem_bytes(plan, spec, arch), plan=plan)
    others = tuple(
        Resources(kernel=name, registers=64, spill_bytes=0, smem_bytes=16384, num_warps=4, binary_bytes=0)
        for name in (*(() if triton.merges_last(plan) else ("merge_splits",)), *(("score_keys",) if spec.score else ()))
    )
    return (attend, *others)


def _guess_selection(plan: Plan, arch: Arch) -> Resources:
    """As binaries for sm_90 were seen to be: they take all registers that a thread of so many can have, and spill where
    it has more than SCORES_HELD scores at a time."""
    threads = plan.integer("num_warps") * arch.warp_size
    taken = _guess(
        "select_rows",
        registers=min(255, arch.registers_per_sm // threads),
        smem_bytes=4 * 2 ** plan.integer("radix_bits"),
        plan=plan,
    )
    excess = max(0, plan.integer("block_n") // threads - SCORES_HELD)
    return dataclasses.replace(taken, spill_bytes=SPILLED_BYTES * excess)


def _guess(kernel: str, *, registers: int, smem_bytes: int, plan: Plan) -> Resources:
    return Resources(
        kernel=kernel,
        registers=registers,
        spill_bytes=0,
        smem_bytes=smem_bytes,
        num_warps=plan.integer("num_warps"),
        binary_bytes=0,
    )
