"""Proof: a kernel's results on small adversarial problems and on its own sizes, against the float64 oracle."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from specattn_codegen.calls import problem_call, select_call
from specattn_codegen.kernel import Call, Kernel, SelectCall
from specattn_codegen.policy import Policy, Threshold, TopK, TopP
from specattn_codegen.proof.check import Verdict, check_attention, check_selection, expect_attention
from specattn_codegen.proof.problems import AttentionProblem, Layout, attention_problem, random_scores
from specattn_codegen.results import VerifyOutput
from specattn_codegen.spec import KernelSpec, Workload

LONG_ROW = 4 * 8192 + 5  # scores that four blocks share whatever a plan's tiles
GARBAGE = 0xA5  # what a workspace holds before a launch, since nothing may depend on it


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """How far a proof goes. The oracle takes seconds for 32 thousand keys, so a workload is checked at a moderate
    size that plans still split.

    keys      most keys of the workload's own problem, of one request; 0 leaves that problem out
    ragged    keys before the rows of the longest ragged request; 0 leaves the ragged problem out
    rows      most query rows of a request
    requests  of the ragged problem, at most 4: one of several tiles, an empty one, one without a prefix, a short one
    """

    keys: int
    ragged: int
    rows: int
    requests: int = 4


ON_DEVICE = Extent(keys=2500, ragged=693, rows=64)


def prove(kernel: Kernel, *, workload: Workload, page_size: int, seed: int, device: str, extent: Extent) -> Verdict:
    """The worst verdict over every problem, or the first that fails."""
    if kernel.spec.op == "select_kv":
        verdicts = _selection_verdicts(kernel, workload, seed, device, extent)
    else:
        verdicts = _attention_verdicts(kernel, workload, page_size, seed, device, extent)
    worst: Verdict | None = None
    for verdict in verdicts:
        if not verdict.passed:
            return verdict
        worst = verdict if worst is None or verdict.worst > worst.worst else worst
    if worst is None:
        raise RuntimeError("a proof without problems")
    return worst


def launch(kernel: Kernel, call: Call, device: str) -> None:
    """One launch with a workspace of its own, full of garbage."""
    workspace = torch.full((kernel.workspace_bytes(call),), GARBAGE, dtype=torch.uint8, device=device)
    kernel.launch(call, workspace)


def _attention_verdicts(
    kernel: Kernel, workload: Workload, page_size: int, seed: int, device: str, extent: Extent
) -> Iterator[Verdict]:
    for problem, expected in _solved(kernel.spec, attention_sizes(workload, seed, extent), page_size):
        call = problem_call(kernel.spec, moved(problem, device))
        launch(kernel, call, device)
        yield check_attention(kernel.spec, problem, call.out, call.lse, call.scores, expected, call.histogram)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProblemSizes:
    """What an attention problem is made of besides the kernel: arguments of problems.attention_problem."""

    q_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    seed: int
    budget: int
    layout: Layout = "nhd"
    magnitude: float = 1.0


# Every plan of a search is held against the same answers, which take the oracle far longer than a kernel.
@functools.lru_cache(maxsize=4)
def _solved(
    spec: KernelSpec, sizes: tuple[ProblemSizes, ...], page_size: int
) -> tuple[tuple[AttentionProblem, VerifyOutput], ...]:
    problems = _problems(spec, sizes, page_size)
    return tuple((problem, expect_attention(spec, problem)) for problem in problems)


def _problems(spec: KernelSpec, sizes: Sequence[ProblemSizes], page_size: int) -> Iterator[AttentionProblem]:
    for one in sizes:
        yield attention_problem(
            spec,
            q_lens=one.q_lens,
            kv_lens=one.kv_lens,
            page_size=page_size,
            seed=one.seed,
            budget=one.budget,
            layout=one.layout,
            magnitude=one.magnitude,
        )


def attention_problems(
    spec: KernelSpec, workload: Workload, page_size: int, seed: int, extent: Extent
) -> Iterator[AttentionProblem]:
    """Those of attention_sizes."""
    return _problems(spec, attention_sizes(workload, seed, extent), page_size)


def attention_sizes(workload: Workload, seed: int, extent: Extent) -> tuple[ProblemSizes, ...]:
    """First ragged as Extent.requests says, softmax peaked and heads before slots in memory. Then the workload's own
    shape, at a moderate size."""
    rows = min(workload.q_len, extent.rows)
    keys = max(rows, min(workload.kv_len, extent.keys))
    ragged = ProblemSizes(
        q_lens=(rows, 1, rows, max(1, rows - 1))[: extent.requests],
        kv_lens=(rows + extent.ragged, 0, rows, rows + 30)[: extent.requests],
        seed=seed,
        budget=min(workload.budget, extent.ragged // 3),
        layout="hnd",
        magnitude=4.0,
    )
    own = ProblemSizes(q_lens=(rows,), kv_lens=(keys,), seed=seed + 1, budget=workload.budget * keys // workload.kv_len)
    return (*((ragged,) if extent.ragged else ()), *((own,) if extent.keys else ()))


def premises(spec: KernelSpec, workload: Workload, page_size: int, seed: int, extent: Extent) -> object:
    """All that a proof's verdict depends on, besides the kernel's own text: equal for sizes that it cannot tell apart,
    and for the heads of a selection, which sees rows of scores only."""
    if spec.op == "select_kv":
        return spec.op, spec.selection_heads, _own_prefix(workload, extent), seed, extent
    return spec, attention_sizes(workload, seed, extent), page_size


def moved(problem: AttentionProblem, device: str) -> AttentionProblem:
    """The problem with every tensor on `device`."""
    tensors = {
        field.name: value.to(device)
        for field in dataclasses.fields(problem)
        if isinstance(value := getattr(problem, field.name), torch.Tensor)
    }
    return dataclasses.replace(problem, **tensors)


def _selection_verdicts(
    kernel: Kernel, workload: Workload, seed: int, device: str, extent: Extent
) -> Iterator[Verdict]:
    for call in selection_calls(kernel.spec, workload, seed, extent, device):
        launch(kernel, call, device)
        yield check_selection(call)


def selection_calls(
    spec: KernelSpec, workload: Workload, seed: int, extent: Extent, device: str
) -> Iterator[SelectCall]:
    """The workload's own rows; then by every policy rows of few distinct scores, so that ties decide, of an empty
    prefix and of one that the budget covers, with layers, unions, blocks of keys and slots; and a row of many tiles,
    which several blocks of a GPU may share."""
    rows = spec.selection_heads
    prefix = _own_prefix(workload, extent)
    own = random_scores(1, rows, [prefix], prefix, seed)
    yield _selection_call(own, [prefix], TopK(ratio=0.07), device, sink=4, recent=16)
    lengths = [extent.ragged, 0, 5, 64]
    tied = torch.round(random_scores(len(lengths), rows, lengths, extent.ragged + 7, seed + 1) * 200)
    yield _selection_call(tied, lengths, TopK(k=40), device, sink=3, recent=8)
    few = tied[:, :1].contiguous()
    yield _selection_call(torch.cat([few, -few], dim=1), lengths, TopK(k=9), device, recent=2, union=2)
    yield _selection_call(few, lengths, TopP(0.95, min=10, max=60), device, sink=3, recent=8)
    table = torch.arange(len(lengths) * 20, dtype=torch.int32).view(len(lengths), 20).flip(1)
    yield _selection_call(
        torch.stack([few, few.flip(0)]),
        [4 * length for length in lengths],
        Threshold(1.0),
        device,
        recent=9,
        block=4,
        page_table=table.to(device),
        page_size=32,
    )
    row = random_scores(1, 1, [LONG_ROW], LONG_ROW, seed + 2)
    for policy in (TopK(ratio=0.05), TopP(0.9)):
        yield _selection_call(row, [LONG_ROW], policy, device, sink=4, recent=16)


def _own_prefix(workload: Workload, extent: Extent) -> int:
    return max(1, min(workload.kv_len, extent.keys) - workload.q_len)


def _selection_call(
    scores: torch.Tensor,
    prefixes: list[int],
    policy: Policy,
    device: str,
    *,
    sink: int = 0,
    recent: int = 0,
    block: int = 1,
    page_table: torch.Tensor | None = None,
    page_size: int = 1,
    union: int = 1,
) -> SelectCall:
    prefix_lens = torch.tensor(prefixes, dtype=torch.int32, device=device)
    return select_call(
        scores.to(device),
        prefix_lens,
        policy,
        sink=sink,
        recent=recent,
        block=block,
        page_table=page_table,
        page_size=page_size,
        union=union,
    )
