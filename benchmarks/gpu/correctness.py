"""Whether every kernel is right on this device: against the float64 oracle, under pytest, under compute-sanitizer."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence

from benchmarks.gpu import CHECKOUT
from benchmarks.gpu.journal import Answer
from benchmarks.gpu.session import Session, Step, Steps
from benchmarks.gpu.sizes import PAGE_SIZE
from specattn_codegen import paths
from specattn_codegen.errors import SpecError
from specattn_codegen.heads import HeadConfig
from specattn_codegen.packs import ladder
from specattn_codegen.plan import Backend, Plan
from specattn_codegen.processors import cpu_info, gpus
from specattn_codegen.processors.arch import Arch
from specattn_codegen.space import backends_for, why_invalid
from specattn_codegen.spec import Dtype, KernelSpec, ScoreSpec, Workload
from specattn_codegen.tuning.jobs import InterpretJob, ProveJob
from specattn_codegen.tuning.outcome import Status
from specattn_codegen.tuning.shortlist import shortlist
from specattn_codegen.tuning.worker import WorkerPool
from specattn_codegen.workloads import DRAFT_LEN, REFERENCE_SCORES, TUNED_OPS, model_specs

Proof = ProveJob | InterpretJob
SEED = 11
PROOF_SECONDS = 120.0
MOST_WORKERS = 14  # each holds a context of the device, and the oracle of each takes a core
DEFINITIONS = (  # besides those that presets use
    ScoreSpec(rows="last", heads="kv_head"),
    ScoreSpec(rows="all", heads="layer", value="logit"),
    ScoreSpec(rows="ends", heads="kv_head", granularity="page_mean"),
    ScoreSpec(rows="all", heads="layer", granularity="page_max"),
    ScoreSpec(rows="all", heads="kv_head", normaliser="reference", histogram=True),
)
REHEARSED_ON = gpus.find("h200")  # whose plans the interpreter runs


def steps(session: Session) -> Steps:
    """The dtype that is served before the others."""
    first, *others = session.sizes.dtypes
    yield from _proofs(session, [first])
    yield Step(key="correctness/pytest", seconds=60, run=functools.partial(run_tests, session))
    for tool in session.sizes.sanitizers:
        yield Step(key=f"correctness/{tool}", seconds=75, run=functools.partial(sanitize, session, tool))
    yield from _proofs(session, others)


def _proofs(session: Session, dtypes: Sequence[Dtype]) -> Steps:
    workers = min(MOST_WORKERS, max(1, cpu_info.core_count() - 1))
    variables = {"OMP_NUM_THREADS": "1"}
    with WorkerPool[Proof](size=workers, deadline_s=PROOF_SECONDS, environment=variables) as pool:
        for dtype in dtypes:
            for name, heads in session.sizes.heads.items():
                run = functools.partial(prove_all, session, pool, _specs(session, heads, dtype))
                yield Step(key=f"correctness/{name}/{dtype}", seconds=45, run=run)


def _specs(session: Session, heads: HeadConfig, dtype: Dtype) -> list[KernelSpec]:
    """Every kernel the presets launch, further score definitions, and 8-bit caches."""
    if session.is_rehearsal:  # the interpreter takes seconds a kernel
        score = REFERENCE_SCORES
        return [KernelSpec(op="verify_attention", heads=heads, dtype=dtype, page_size=PAGE_SIZE, score=score)]
    specs = list(model_specs(heads, dtype=dtype, page_size=PAGE_SIZE, ops=TUNED_OPS))
    if heads.window is None and dtype == "bfloat16":
        verify = functools.partial(KernelSpec, op="verify_attention", heads=heads, dtype=dtype, page_size=PAGE_SIZE)
        specs += [verify(score=score) for score in DEFINITIONS]
        specs += [verify(kv_dtype=kv_dtype, score=REFERENCE_SCORES) for kv_dtype in ("float8_e4m3", "float8_e5m2")]
    return specs


def prove_all(session: Session, pool: WorkerPool[Proof], specs: Sequence[KernelSpec]) -> Answer:
    """Several plans of every kernel on every backend that is here: the default, what the packs would load, and unlike
    ones the cost model likes. Kernels that a backend does not serve are named, with its reason."""
    asked = [(spec, _plans(session, spec, backend)) for spec in specs for backend in backends(session)]
    jobs = [_job(session, spec, plan) for spec, plans in asked if not isinstance(plans, str) for plan in plans]
    found = [
        {
            "spec": job.spec.name,
            "plan": str(job.plan),
            "status": outcome.status.value,
            "worst_error": outcome.worst_error,
            "detail": outcome.detail,
        }
        for job, outcome in pool.run(jobs)
    ]
    wrong = [one for one in found if one["status"] != Status.OK.value]
    return session.label(
        {
            "backends": list(backends(session)),
            "kernels": len(specs),
            "proofs": len(found),
            "wrong": wrong,
            "not_served": [f"{spec.name}: {plans}" for spec, plans in asked if isinstance(plans, str)],
            "proved": found,
        }
    )


def backends(session: Session) -> tuple[Backend, ...]:
    """Those of this GPU that are installed; the interpreter knows Triton alone."""
    if session.is_rehearsal:
        return ("triton",)
    return tuple(backend for backend in backends_for(session.arch) if importlib.util.find_spec(backend))


def workload_of(spec: KernelSpec) -> Workload:
    """A moderate size that plans split all the same."""
    rows = DRAFT_LEN + 1 if spec.op == "verify_attention" else 1
    return Workload(batch=2, q_len=rows, kv_len=4096, budget=0 if spec.op == "verify_attention" else 280)


def _arch(session: Session) -> Arch:
    return REHEARSED_ON if session.is_rehearsal else session.arch


def _plans(session: Session, spec: KernelSpec, backend: Backend) -> list[Plan] | str:
    """Plans to check; or why the backend does not serve the kernel."""
    arch, workload = _arch(session), workload_of(spec)
    try:
        plans = shortlist(spec, workload, arch, backend, count=session.sizes.plans_checked)
    except SpecError as error:
        return str(error)
    reason = why_invalid(plans[0], spec, arch)
    if reason is not None:
        return reason
    packed = ladder.lookup(spec, workload, arch, paths.pack_layers())
    known = [packed.plan] if packed and packed.plan.backend == backend else []
    return list(dict.fromkeys([*plans, *known]))


def _job(session: Session, spec: KernelSpec, plan: Plan) -> Proof:
    workload = workload_of(spec)
    if session.is_rehearsal:
        return InterpretJob(spec=spec, plan=plan, arch=REHEARSED_ON, workload=workload, seed=SEED)
    page_size = PAGE_SIZE
    return ProveJob(spec=spec, plan=plan, arch=session.arch, workload=workload, page_size=page_size, seed=SEED)


def run_tests(session: Session) -> Answer:
    """`pytest -m gpu` over the files that have such tests, where pytest is."""
    if importlib.util.find_spec("pytest") is None:
        return session.label({"skipped": "pytest is not installed here"})
    files = [str(path) for path in sorted((CHECKOUT / "tests").glob("test_*.py")) if "mark.gpu" in path.read_text()]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "--no-header", *files]
    return session.label(_ran(command, seconds=900 if session.is_rehearsal else 240))


def sanitize(session: Session, tool: str) -> Answer:
    """One launch of each kernel of a sample under a tool of compute-sanitizer, or alone in a rehearsal."""
    sample = [sys.executable, "-m", "benchmarks.gpu.sanitized"]
    program = shutil.which("compute-sanitizer")
    if session.is_rehearsal:
        return session.label(_ran([*sample, "--rehearse"], seconds=900))
    if program is None:
        return session.label({"skipped": "compute-sanitizer is not on the PATH"})
    return session.label(_ran([program, "--tool", tool, "--error-exitcode", "9", *sample], seconds=240))


def _ran(command: Sequence[str], *, seconds: float) -> dict[str, object]:
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    try:
        ended = subprocess.run(
            command, cwd=CHECKOUT, env=variables, capture_output=True, text=True, check=False, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return {"passed": False, "exit_code": None, "output": f"no end within {seconds:g} s"}
    text = re.sub(r"\x1b\[[0-9;]*m", "", ended.stdout + ended.stderr)
    return {"passed": ended.returncode == 0, "exit_code": ended.returncode, "output": text[-4000:]}
