"""Measured packs: the tuner's own search of a shortlist, as there is neither an optimiser nor the time for one."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Iterable, Mapping, Sequence

from benchmarks.gpu.journal import Answer
from benchmarks.gpu.session import Session, Step, Steps
from benchmarks.gpu.sizes import PAGE_SIZE, budget
from specattn_codegen.digest import to_plain
from specattn_codegen.heads import HeadConfig
from specattn_codegen.packs import pack
from specattn_codegen.packs.pack import Entry
from specattn_codegen.plan import Plan
from specattn_codegen.processors import cpu_info
from specattn_codegen.processors.arch import Arch
from specattn_codegen.spec import KernelSpec, ScoreHeads, Workload
from specattn_codegen.tuning.jobs import CompileJob, ProveJob
from specattn_codegen.tuning.record import Record
from specattn_codegen.tuning.shortlist import Shortlisted, shortlist
from specattn_codegen.tuning.tune_measured import tune_measured
from specattn_codegen.tuning.tune_session import Budget, Logbook, Target, Task
from specattn_codegen.tuning.worker import WorkerPool
from specattn_codegen.tuning.workforce import Pool, processes
from specattn_codegen.workloads import (
    DRAFT_LEN,
    PILLAR_SCORES,
    REFERENCE_SCORES,
    VEGAS_SCORES,
    select_spec,
)

Ahead = CompileJob | ProveJob
TRIALS = "trials.jsonl"
SEED = 0
TASK_SECONDS = 60.0
BUILD_SECONDS = 90.0
MOST_BUILDERS = 14
FEWER = 4  # times; plans of a backend beside the usual one


def steps(session: Session) -> Steps:
    """By size, then by heads: every model has something before any has everything."""
    workers = min(MOST_BUILDERS, max(1, cpu_info.core_count() - 1))
    variables = {"TRITON_INTERPRET": None, "OMP_NUM_THREADS": "1"}
    builders = WorkerPool[Ahead](size=workers, deadline_s=BUILD_SECONDS, environment=variables)
    with builders, processes("compile") as compilers, processes("measure") as measurer:
        pools: dict[str, Pool] = {"compile": compilers, "measure": measurer}
        for batch, kv_len in session.sizes.tuned:
            for name, heads in session.sizes.heads.items():
                for task in tasks(session, heads, batch, kv_len):
                    run = functools.partial(tune_one, session, task, builders, pools)
                    yield Step(key=f"tuning/{name}/{task.name}", seconds=TASK_SECONDS, run=run)


def tasks(session: Session, heads: HeadConfig, batch: int, kv_len: int) -> Iterable[Task]:
    """What a round and dense decoding launch, the most time-consuming first."""
    page_size = PAGE_SIZE if session.arch.is_gpu else 0
    attention = functools.partial(KernelSpec, heads=heads, dtype="bfloat16", page_size=page_size)
    rows = Workload(batch=batch, q_len=DRAFT_LEN + 1, kv_len=kv_len)
    one = Workload(batch=batch, q_len=1, kv_len=kv_len)
    if session.is_rehearsal:
        yield Task(spec=attention(op="verify_attention", score=REFERENCE_SCORES), workloads=(rows,))
        return
    if heads.window is not None:
        yield Task(spec=attention(op="verify_attention"), workloads=(rows,))
        yield Task(spec=attention(op="verify_attention"), workloads=(one,))
        return
    chosen = dataclasses.replace(one, budget=budget(kv_len))
    for score in (REFERENCE_SCORES, VEGAS_SCORES, PILLAR_SCORES):
        yield Task(spec=attention(op="verify_attention", score=score), workloads=(rows,))
    selections: tuple[ScoreHeads, ...] = ("kv_head", "layer")
    for selection in selections:
        yield Task(spec=attention(op="sparse_attention", selection=selection), workloads=(chosen,))
    for workload in (one, rows):
        yield Task(spec=attention(op="verify_attention"), workloads=(workload,))
    for shared in (False, True):
        spec = select_spec(heads, layer_shared=shared)
        yield Task(spec=spec, workloads=(dataclasses.replace(rows, budget=budget(kv_len)),))


class Printed:
    """A listener for a log."""

    def task_started(self, task: Task, trials: int) -> None:
        print(f"   {task.name}: at most {trials} plans", flush=True)

    def trial_done(self, task: Task, trial: Record, best_us: float | None) -> None:
        """Trials are in the log of trials."""

    def proving(self, task: Task, count: int) -> None:
        """Proofs are part of a trial here."""

    def task_done(self, task: Task, winners: Sequence[Entry]) -> None:
        for entry in winners:
            print(f"   {task.name}: {entry.latency_us:.1f} us, {entry.plan}", flush=True)


def tune_one(session: Session, task: Task, builders: WorkerPool[Ahead], pools: Mapping[str, Pool]) -> Answer:
    """Builds and proves the shortlist on all cores, then times it alone; the winner goes to the folder's packs."""
    target = dataclasses.replace(session.target, arch=rated(session))
    (workload,) = task.workloads
    plans = candidates(task.spec, workload, target, session.sizes.plans_timed)
    build(session, task, plans, builders)
    book = Logbook.open(target, task.spec.heads, session.journal.folder / TRIALS)
    won: list[Entry] = []
    limit = Budget(trials=len(plans), seed=SEED, ends_at=time.monotonic() + TASK_SECONDS)
    tune_measured(
        [task],
        target,
        limit,
        book,
        Printed(),
        won.extend,
        lambda _: Shortlisted(plans),
        lambda stage: contextlib.nullcontext(pools[stage]),
    )
    if won:
        pack.publish(session.journal.folder / "packs", target.arch, task.spec.heads, won)
    return session.label({"plans": len(plans), "winners": [to_plain(entry) for entry in won]})


def candidates(spec: KernelSpec, workload: Workload, target: Target, count: int) -> list[Plan]:
    """`count` plans of the usual backend, and a few of each other one that serves the kernel."""
    usual, *others = target.each(spec)
    few = max(1, count // FEWER)
    asked = [(usual, count), *((other, few) for other in others)]
    return [plan for one, most in asked for plan in shortlist(spec, workload, one.arch, one.backend, count=most)]


def build(session: Session, task: Task, plans: Sequence[Plan], builders: WorkerPool[Ahead]) -> None:
    """Leaves every plan's binary and its resources in the caches, so that timing waits for no compiler."""
    if session.is_rehearsal:
        return
    spec, arch, (workload,) = task.spec, session.arch, task.workloads
    proofs = [
        ProveJob(spec=spec, plan=plan, arch=arch, workload=workload, page_size=PAGE_SIZE, seed=SEED) for plan in plans
    ]
    compiled = [CompileJob(spec=spec, plan=plan, arch=arch) for plan in plans]
    for _ in builders.run([*compiled, *proofs]):
        pass  # a plan that fails here fails again where it is timed, and is recorded there


def rated(session: Session) -> Arch:
    """The processor; in a rehearsal with the rates that its ceilings found, as a CPU has none of a data sheet."""
    if session.arch.is_gpu:
        return session.arch
    answers = session.journal.answers()
    return dataclasses.replace(
        session.arch,
        bandwidth_gbs=_rate(answers.get("ceilings/read", {}).get("gbs")),
        fp32_tflops=1.0,
        bf16_tflops=1.0,
    )


def _rate(value: object) -> float:
    return value if isinstance(value, float) else 1.0
