"""Ours beside everybody else's in the same run: verification, selection and sparse attention, each in turns."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.gpu import flashinfer_peers
from benchmarks.gpu.journal import Answer
from benchmarks.gpu.session import Session, Step, Steps
from benchmarks.gpu.sizes import PAGE_SIZE, budget
from specattn_bench import peers
from specattn_bench.measured import inputs_of, launches
from specattn_bench.peers import DenseInputs, dense_inputs
from specattn_bench.plans import Plans, choose
from specattn_bench.timing import Launch, in_turn, turns
from specattn_codegen import build
from specattn_codegen.calls import problem_call, select_call
from specattn_codegen.cost_model.floor import Work, least_work
from specattn_codegen.heads import HeadConfig
from specattn_codegen.kernel import AttentionCall, Kernel
from specattn_codegen.policy import TopK
from specattn_codegen.proof.problems import AttentionProblem, timing_problem
from specattn_codegen.spec import KernelSpec, ScoreSpec, Workload
from specattn_codegen.tuning.jobs import render_for
from specattn_codegen.tuning.measure import rotated
from specattn_codegen.workloads import DRAFT_LEN, PILLAR_SCORES, REFERENCE_SCORES, VEGAS_SCORES, select_spec

Dense = Callable[[DenseInputs], Launch]  # a peer that reads contiguous caches, made outside the timing
Paged = Callable[[AttentionProblem], Launch]  # a peer that reads our pages
Overrides = Mapping[str, str]
Inputs = TypeVar("Inputs", DenseInputs, AttentionProblem)
OURS: Mapping[str, tuple[ScoreSpec | None, Overrides]] = {
    "no scores": (None, {}),
    "reference": (REFERENCE_SCORES, {}),
    "ends": (VEGAS_SCORES, {}),
    "ends, dump and reduce (Vegas' method)": (VEGAS_SCORES, {"score_method": "dump"}),
    "all": (PILLAR_SCORES, {}),
    "all, second pass (SparseSpec's method)": (PILLAR_SCORES, {"score_method": "remat"}),
}
NOBODY: Mapping[str, Callable[..., Launch]] = {}
UNSCORED = ("no scores",)
REHEARSED = ("no scores", "reference")
SEED = 3
SPARSE_SHARE = 0.05
COMPILED_ROWS = (8,)  # torch.compile takes half a minute a shape


def steps(session: Session) -> Steps:
    model, ours = session.sizes.model.heads, REHEARSED if session.is_rehearsal else tuple(OURS)
    for workload in session.sizes.peers:
        run = functools.partial(race, session, workload, ours, dense=dense_peers())
        yield Step(key=f"peers/verify/{workload.name}", seconds=25, run=run)
    for batch, kv_len in session.sizes.selections:
        yield Step(
            key=f"peers/select/b{batch}-n{kv_len}",
            seconds=20,
            run=functools.partial(race_selections, session, batch, kv_len),
        )
    for batch, kv_len in session.sizes.sparse:
        for block in (1, PAGE_SIZE):
            run = functools.partial(race_sparse, session, batch, kv_len, block)
            yield Step(key=f"peers/sparse/b{batch}-n{kv_len}-block{block}", seconds=20, run=run)
    for workload in session.sizes.peers:
        run = functools.partial(race, session, workload, UNSCORED, paged=flashinfer_peers.makers(model, workload))
        yield Step(key=f"peers/flashinfer/{workload.name}", seconds=45, run=run)
    for workload in session.sizes.peers:
        if session.is_rehearsal or workload.q_len in COMPILED_ROWS:
            flex: dict[str, Dense] = {"FlexAttention": functools.partial(_flex, session)}
            run = functools.partial(race, session, workload, UNSCORED, dense=flex)
            yield Step(key=f"peers/flex/{workload.name}", seconds=60, run=run)


def dense_peers() -> dict[str, Dense]:
    """Torch's own attention."""
    backends = {
        "SDPA flash": SDPBackend.FLASH_ATTENTION,
        "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
        "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
    }
    fused = {
        f"{name}, group as rows{note}": functools.partial(_sdpa, backend=backend, masked=masked)
        for name, backend in backends.items()
        for masked, note in ((True, ""), (False, ", nothing masked"))
    }
    return {**fused, peers.WITH_SCORES: peers.matmuls_with_scores}


def _sdpa(inputs: DenseInputs, *, backend: SDPBackend, masked: bool) -> Launch:
    """The query heads of a group as rows of their KV head. Not every backend takes a mask; without one the rows see
    each other, the bytes read being the same."""
    q, mask = inputs.packed_q, inputs.packed_mask if masked else None

    def launch() -> torch.Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, inputs.k, inputs.v, attn_mask=mask, scale=inputs.scale)

    return launch


def _flex(session: Session, inputs: DenseInputs) -> Launch:
    rows, keys = inputs.q.shape[2], inputs.k.shape[2]

    def visible(b: torch.Tensor, h: torch.Tensor, row: torch.Tensor, key: torch.Tensor) -> torch.Tensor:  # noqa: ARG001
        return key <= row + (keys - rows)

    mask = create_block_mask(visible, None, None, rows, keys, device=session.device)
    attend = flex_attention if session.is_rehearsal else torch.compile(flex_attention, dynamic=False)
    return lambda: attend(inputs.q, inputs.k, inputs.v, block_mask=mask, scale=inputs.scale, enable_gqa=True)


def race(
    session: Session,
    workload: Workload,
    ours: Sequence[str],
    *,
    dense: Mapping[str, Dense] = NOBODY,
    paged: Mapping[str, Paged] = NOBODY,
) -> Answer:
    """Verification by our kernels and by peers, over the same keys, none of which is in a cache when it is read."""
    heads = session.sizes.model.heads
    page_size = PAGE_SIZE if session.arch.is_gpu else 0
    attention = functools.partial(KernelSpec, op="verify_attention", heads=heads, dtype="bfloat16", page_size=page_size)
    specs = {name: attention(score=OURS[name][0]) for name in ours}
    problem = timing_problem(
        attention(score=REFERENCE_SCORES), workload, page_size=PAGE_SIZE, seed=SEED, device=session.device
    )
    copies, turn = _copies(session, problem)
    runs: dict[str, Callable[[], None]] = {}
    about: dict[str, dict[str, object]] = {}
    for name, spec in specs.items():
        kernel, found = _chosen(session, spec, workload, OURS[name][1])
        runs[name] = in_turn(launches(kernel, calls(kernel, copies)), turn)
        about[name] = _said(kernel, found, least_work(spec, workload))
    contiguous = [dense_inputs(heads, copy) for copy in copies] if dense else []
    for name, make in dense.items():
        _enter(name, functools.partial(_each, make, contiguous), turn, runs, about)
    for name, make in paged.items():
        _enter(name, functools.partial(_each, make, copies), turn, runs, about)
    return _answer(session, workload, runs, about)


def calls(kernel: Kernel, copies: Sequence[AttentionProblem]) -> list[AttentionCall]:
    return [problem_call(kernel.spec, inputs_of(kernel.spec, copy)) for copy in copies]


def _copies(session: Session, problem: AttentionProblem) -> tuple[list[AttentionProblem], Iterator[int]]:
    """The problem over as many caches as it takes for one to have left the L2 before its next turn; and whose turn it
    is, for all series together."""
    size = problem.k_cache.nbytes + problem.v_cache.nbytes
    count, turn = (2, itertools.cycle(range(2))) if session.is_rehearsal else turns(size, session.arch)
    return rotated(problem, count), turn


def _each(make: Callable[[Inputs], Launch], copies: Sequence[Inputs]) -> list[Launch]:
    return [make(copy) for copy in copies]


def _chosen(session: Session, spec: KernelSpec, workload: Workload, overrides: Overrides) -> tuple[Kernel, str]:
    """The kernel that a pack or the default plan gives, with overrides where the backend has such a setting."""
    chosen = choose(spec, workload, session.arch, Plans(source="tuned", overrides=overrides))
    return build.load(render_for(spec, chosen.plan, session.arch)), chosen.found


def _said(kernel: Kernel, found: str, least: Work) -> dict[str, object]:
    return {"plan": str(kernel.plan), "found": found, "least": dataclasses.asdict(least)}


def _enter(
    name: str,
    make: Callable[[], Sequence[Launch]],
    turn: Iterator[int],
    runs: dict[str, Callable[[], None]],
    about: dict[str, dict[str, object]],
) -> None:
    """Enters a peer once every launch of it has run; or says why it would not."""
    try:
        with torch.inference_mode():
            made = make()
            for launch in made:
                launch()
    except Exception as error:  # noqa: BLE001 - others' code may refuse in any way, and how it does is the answer
        about[name] = {"refused": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    else:
        about[name] = {}
        runs[name] = in_turn(made, turn)


def _answer(
    session: Session,
    workload: Workload,
    runs: Mapping[str, Callable[[], None]],
    about: Mapping[str, Mapping[str, object]],
) -> Answer:
    timings = dict(zip(runs, session.time(*runs.values()), strict=True))
    series = {
        name: {**said, **({"timing": dataclasses.asdict(timings[name])} if name in timings else {})}
        for name, said in about.items()
    }
    return session.label({"workload": dataclasses.asdict(workload), "series": series})


def race_selections(session: Session, batch: int, kv_len: int) -> Answer:
    """Top-k of every layer's scores in one launch, beside torch.topk and FlashInfer's."""
    heads, layers = session.sizes.model.heads, session.sizes.layers
    prefix = kv_len - DRAFT_LEN - 1
    workload = Workload(batch=batch, q_len=DRAFT_LEN + 1, kv_len=kv_len, budget=budget(kv_len))
    spec = select_spec(heads, layer_shared=False)
    shape = (layers, batch, heads.num_kv_heads, prefix)
    scores = torch.randn(shape, device=session.device).mul_(3.0).sub_(8.0).exp_()  # heavy-tailed, as weights are
    lengths = torch.full((batch,), prefix, dtype=torch.int32, device=session.device)
    call = select_call(scores, lengths, TopK(k=workload.budget))
    kernel, found = _chosen(session, spec, workload, {})
    workspace = scores.new_empty(kernel.workspace_bytes(call), dtype=torch.uint8)
    least = least_work(spec, dataclasses.replace(workload, batch=layers * batch))
    runs: dict[str, Callable[[], None]] = {"ours": lambda: kernel.launch(call, workspace)}
    about: dict[str, dict[str, object]] = {"ours": _said(kernel, found, least)}
    theirs: dict[str, Callable[[], list[Launch]]] = {
        "torch.topk": lambda: [functools.partial(torch.topk, scores, workload.budget, dim=-1, sorted=False)],
        "FlashInfer top_k_page_table_transform": lambda: [flashinfer_peers.top_k(scores, workload.budget)],
    }
    for name, make in theirs.items():
        _enter(name, make, itertools.repeat(0), runs, about)
    return _answer(session, workload, runs, about)


def race_sparse(session: Session, batch: int, kv_len: int, block: int) -> Answer:
    """A draft step's attention over SPARSE_SHARE of the keys, chosen one by one or by pages for each KV head, beside
    gathering the same keys for torch's attention."""
    heads = session.sizes.model.heads
    workload = Workload(batch=batch, q_len=1, kv_len=kv_len, budget=math.ceil(SPARSE_SHARE * kv_len))
    spec = KernelSpec(
        op="sparse_attention",
        heads=heads,
        dtype="bfloat16",
        page_size=PAGE_SIZE if session.arch.is_gpu else 0,
        selection="kv_head",
    )
    problem = timing_problem(spec, workload, page_size=PAGE_SIZE, seed=SEED, device=session.device, block=block)
    copies, turn = _copies(session, problem)
    kernel, found = _chosen(session, spec, workload, {})
    runs = {"ours": in_turn(launches(kernel, calls(kernel, copies)), turn)}
    about = {"ours": _said(kernel, found, least_work(spec, workload))}
    _enter("gather, then SDPA", lambda: [gathered(copy, heads) for copy in copies], turn, runs, about)
    return _answer(session, workload, runs, about)


def gathered(problem: AttentionProblem, heads: HeadConfig) -> Launch:
    """The selected keys and the row's own, copied next to each other for every KV head, then attended to."""
    if problem.indices is None:
        raise TypeError("a sparse problem carries a selection")
    batch, kv_heads, page_size = problem.kv_lens.shape[0], heads.num_kv_heads, problem.k_cache.shape[1]
    keys = problem.indices.long()[..., None] * problem.block
    keys = (keys + torch.arange(problem.block, device=keys.device)).flatten(2)
    newest = (problem.kv_lens.long() - 1).view(batch, 1, 1).expand(batch, kv_heads, 1)
    keys = torch.cat([keys, newest], dim=2)  # [B, Hkv, K]
    pages = problem.page_table.long()[torch.arange(batch, device=keys.device)[:, None, None], keys // page_size]
    slots = pages * page_size + keys % page_size
    head = torch.arange(kv_heads, device=keys.device)[None, :, None]
    q = problem.q.view(batch, kv_heads, heads.group, heads.head_dim)
    k_cache, v_cache = problem.k_cache.flatten(0, 1), problem.v_cache.flatten(0, 1)
    return lambda: scaled_dot_product_attention(q, k_cache[slots, head], v_cache[slots, head], scale=heads.scale)
