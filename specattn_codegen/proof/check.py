"""Verdict: a kernel's results against the oracle. Tolerances follow from the dtype and the problem's magnitudes.

Rounding errors of n fp32 additions are bounded by `4 sqrt(n) u` with overwhelming probability (Higham and Mary,
"A New Approach to Probabilistic Rounding Error Analysis", SISC 2019), u being half a unit in the last place.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch

from specattn_codegen.kernel import SelectCall
from specattn_codegen.policy import MASS_TOLERANCE, Policy, Threshold, TopK, TopP
from specattn_codegen.proof import reference
from specattn_codegen.proof.problems import AttentionProblem
from specattn_codegen.results import Selection, VerifyOutput
from specattn_codegen.spec import KernelSpec

HALF_ULP = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
# What a stored weight may lose where it underflows: half the smallest float16 denormal, or the smallest normal float32.
UNDERFLOW = {"float32": 2.0**-126, "float16": 2.0**-25, "bfloat16": 2.0**-25}
SAFETY = 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """worst: the largest error as a multiple of its tolerance, over every checked element; passes at most at 1."""

    passed: bool
    worst: float
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Tolerance:
    """Absolute bounds for out and lse; scores are bounded relatively to their size, plus an absolute floor."""

    out: torch.Tensor
    lse: torch.Tensor
    scores_relative: float
    scores_floor: float


def tolerance(
    spec: KernelSpec, problem: AttentionProblem, expected_out: torch.Tensor, expected_lse: torch.Tensor
) -> Tolerance:
    """Half-precision kernels may round the softmax weights to the cache's dtype before the product with V."""
    unit, unit_dtype = HALF_ULP["float32"], HALF_ULP[spec.dtype]
    if problem.q.numel() == 0:
        return Tolerance(out=expected_out, lse=expected_lse, scores_relative=0.0, scores_floor=0.0)
    k_scale, v_scale = (1.0 if s is None else s.max().item() for s in (problem.k_scale, problem.v_scale))
    keys = problem.k_cache.double().nan_to_num(0.0).norm(dim=-1).max().item() * k_scale
    values = problem.v_cache.double().nan_to_num(0.0).abs().max().item() * v_scale
    logit = spec.heads.scale * problem.q.double().norm(dim=-1).max().item() * keys
    logit_error = unit * (SAFETY * math.sqrt(spec.heads.head_dim) * logit + logit + SAFETY)
    sum_error = SAFETY * math.sqrt(max(1, int(problem.kv_lens.max()))) * unit
    weight_error = 2.0 * logit_error + sum_error
    rounded_weights = 0.0 if spec.dtype == "float32" else unit_dtype
    weights = spec.score is None or spec.score.value == "weight"
    references = 0.0 if problem.lse_ref is None else problem.lse_ref.nan_to_num(0.0, 0.0, 0.0).abs().max().item()
    reference_error = SAFETY * unit * references
    return Tolerance(
        out=values * (weight_error + rounded_weights) + 2.0 * unit_dtype * expected_out.abs(),
        lse=logit_error + sum_error + 2.0 * unit * expected_lse.abs().nan_to_num(0.0, posinf=0.0, neginf=0.0),
        scores_relative=weight_error + rounded_weights + reference_error,
        scores_floor=UNDERFLOW[spec.dtype] if weights else logit_error + sum_error * logit,
    )


def _excess(actual: torch.Tensor, expected: torch.Tensor, allowed: torch.Tensor) -> float:
    """Largest |actual - expected| / allowed; infinite where one is NaN or infinite and the other is not."""
    if expected.numel() == 0:
        return 0.0
    actual = actual.detach().cpu().double()
    same = actual == expected
    ratio = torch.where(same, 0.0, (actual - expected).abs() / allowed.clamp_min(1e-300))
    return ratio.nan_to_num(nan=math.inf).max().item()


def _verdict(errors: dict[str, float]) -> Verdict:
    worst = max(errors.values())
    detail = ", ".join(f"{name} {error:.3g}" for name, error in errors.items())
    return Verdict(passed=worst <= 1.0, worst=worst, detail=f"error / tolerance: {detail}")


def expect_attention(spec: KernelSpec, problem: AttentionProblem) -> VerifyOutput:
    """What the float64 reference gives; slow for long requests, so callers that check many kernels keep it."""
    common = (problem.q, problem.k_cache, problem.v_cache, problem.page_table, problem.kv_lens, problem.cu_q)
    scales = {"sinks": problem.sinks, "k_scale": problem.k_scale, "v_scale": problem.v_scale}
    if spec.op == "verify_attention":
        return reference.verify_attention(
            *common, heads=spec.heads, score=spec.score, max_kv=problem.max_kv, lse_ref=problem.lse_ref, **scales
        )
    if problem.indices is None or problem.counts is None:
        raise TypeError("a sparse_attention problem carries a selection")
    selection = Selection(problem.indices, problem.counts, problem.block)
    if problem.mode is not None:
        return reference.mixed_attention(
            *common,
            selection,
            problem.tail_start,
            problem.mode,
            heads=spec.heads,
            score=spec.score,
            max_kv=problem.max_kv,
            lse_ref=problem.lse_ref,
            **scales,
        )
    found = reference.sparse_attention(*common, selection, problem.tail_start, heads=spec.heads, **scales)
    return VerifyOutput(found.out, found.lse, None)


def check_attention(
    spec: KernelSpec,
    problem: AttentionProblem,
    out: torch.Tensor,
    lse: torch.Tensor,
    scores: torch.Tensor | None = None,
    expected: VerifyOutput | None = None,
    histogram: torch.Tensor | None = None,
) -> Verdict:
    """Compares out, lse and (where the spec scores) the prefix columns of scores with the float64 reference."""
    expected = expected or expect_attention(spec, problem)
    allowed = tolerance(spec, problem, expected.out, expected.lse)
    errors = {"out": _excess(out, expected.out, allowed.out), "lse": _excess(lse, expected.lse, allowed.lse)}
    if expected.scores is not None:
        if scores is None:
            raise TypeError("the spec asks for scores and the kernel gave none")
        if spec.score is not None and spec.score.histogram and histogram is None:
            raise TypeError("the spec asks for a histogram and the kernel gave none")
        written = ~expected.scores.isnan()
        want = expected.scores[written]
        bound = want.abs().nan_to_num(posinf=0.0) * allowed.scores_relative + allowed.scores_floor
        errors["scores"] = _excess(scores.cpu()[written], want, bound)
        if histogram is not None:  # exact, of the scores as the kernel wrote them
            counted = reference.count_scores(torch.where(written, scores.cpu(), math.nan))
            errors["histogram"] = math.inf if bool((histogram.cpu() != counted).any()) else 0.0
    return _verdict(errors)


def check_selection(call: SelectCall) -> Verdict:
    """The outputs of a call against the reference, on exactly the same scores: same counts, same ascending indices, -1
    in every column after a row's count, and the slots of those indices.

    Where rounding may decide, the count may lie anywhere between those of a mass MASS_TOLERANCE smaller and larger, and
    the keys must be the best ones of that count; of a union, whose rows' counts nobody wrote down, any between.
    """
    scores, counts = call.scores.cpu(), call.counts.cpu()
    least, most = (_expected_selection(call, scores, policy) for policy in _mass_bounds(call.policy))
    possible = (counts >= least.counts) & (counts <= most.counts)
    expected = _padded(least.indices, call.indices.shape[-1])
    for row in (possible & (least.counts < most.counts)).nonzero().tolist():
        if call.union == 1:
            expected[tuple(row)] = _best_of_row(call, scores, row)
        else:
            expected[tuple(row)] = _possible_union(
                *(s.indices[tuple(row)].cpu() for s in (least, most, call.selection))
            )
    wrong = {"counts": ~possible, "indices": expected != call.indices.cpu()}
    if call.page_table is not None and call.slots is not None:
        slots = reference.physical_slots(expected, call.page_table.cpu(), call.slots_per_page)
        wrong["slots"] = slots != call.slots.cpu()
    return _verdict({name: math.inf if bool(where.any()) else 0.0 for name, where in wrong.items()})


def _mass_bounds(policy: Policy) -> tuple[Policy, Policy]:
    """The policies between which a selection may lie; p=1 takes every key with a mass, whatever the rounding."""
    if not isinstance(policy, TopP) or (policy.p == 1.0 and policy.bisection_steps is None):
        return policy, policy
    least, most = max(0.0, policy.p - MASS_TOLERANCE), min(1.0, policy.p + MASS_TOLERANCE)
    return dataclasses.replace(policy, p=least), dataclasses.replace(policy, p=most)


def _expected_selection(call: SelectCall, scores: torch.Tensor, policy: Policy) -> Selection:
    if call.thresholds is not None:
        policy = Threshold(call.thresholds.cpu())
    return reference.select_kv(
        scores, call.prefix_lens.cpu(), policy, sink=call.sink, recent=call.recent, block=call.block, union=call.union
    )


def _best_of_row(call: SelectCall, scores: torch.Tensor, row: list[int]) -> torch.Tensor:
    """The indices of one row's best keys, as many as the kernel counted."""
    count, request = int(call.counts[tuple(row)]), row[-2]
    if count == 0:
        return torch.full((call.indices.shape[-1],), -1, dtype=torch.int32)
    chosen = reference.select_kv(
        scores[tuple(row)][None, None],
        call.prefix_lens.cpu()[request : request + 1],
        TopK(k=count * call.block),
        sink=call.sink,
        recent=call.recent,
        block=call.block,
    )
    return _padded(chosen.indices, call.indices.shape[-1])[0, 0]


def _possible_union(least: torch.Tensor, most: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """The indices of a row found [K], but for what it must and what it must not have."""
    keys = sorted((set(found.tolist()) & set(most.tolist()) | set(least.tolist())) - {-1})
    return _padded(torch.tensor(keys, dtype=torch.int32), len(found))


def _padded(indices: torch.Tensor, width: int) -> torch.Tensor:
    return torch.nn.functional.pad(indices, (0, width - indices.shape[-1]), value=-1)
