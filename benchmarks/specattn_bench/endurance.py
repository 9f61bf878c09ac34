"""What does a tuning run lose when it is killed? Nothing that was finished, at whatever instant."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import signal
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import click

from specattn_bench import report
from specattn_codegen.digest import digest
from specattn_codegen.errors import PackError
from specattn_codegen.heads import HeadConfig
from specattn_codegen.packs import pack
from specattn_codegen.packs.pack import Entry
from specattn_codegen.processors import cpu_info
from specattn_codegen.spec import KernelSpec, ScoreSpec, Workload
from specattn_codegen.tuning import record
from specattn_codegen.tuning.jobs import BuildJob, MeasureJob
from specattn_codegen.tuning.measure import summary
from specattn_codegen.tuning.outcome import Outcome, Status
from specattn_codegen.tuning.record import Record, Stage
from specattn_codegen.tuning.shared_study import open_storage
from specattn_codegen.tuning.tune import Method, tune
from specattn_codegen.tuning.tune_session import Budget, Target, Task
from specattn_codegen.tuning.workforce import TuningJob

HELP = """Kills a tuning run, SIGKILL, at random instants, and starts it again on what it left.

The run is the real one, with its records, its shared study and its pack on disk; only its trials are pretended and
take a few milliseconds. After every kill each file is read back: a finished trial that is missing, or a file that
cannot be read, is counted.
"""
HEADS = HeadConfig(num_q_heads=8, num_kv_heads=2, head_dim=32)
SPEC = KernelSpec(op="verify_attention", heads=HEADS, score=ScoreSpec())
SIZES = tuple(Workload(batch=1, q_len=3, kv_len=keys) for keys in (1024, 4096, 16384))
LONGEST_LIFE_S = 2.0  # about what a whole run takes
TRIAL_S = 0.002


class Pretended:
    """A workforce whose trials take a moment and give times made from the plan."""

    def __call__(self, stage: Stage) -> AbstractContextManager[Pretended]:  # noqa: ARG002 - a Workforce
        return contextlib.nullcontext(self)

    def start(self, jobs: Sequence[TuningJob]) -> None:
        """Nothing to build."""

    def run(self, jobs: Iterable[TuningJob]) -> Iterator[tuple[TuningJob, Outcome]]:
        for job in jobs:
            time.sleep(TRIAL_S)
            yield job, pretended(job)


def pretended(job: TuningJob) -> Outcome:
    if isinstance(job, BuildJob) or not isinstance(job, MeasureJob):
        return Outcome(status=Status.OK)
    medians = [100.0 + int(digest(plan)[:4], 16) / 100 for plan in job.plans]
    timings = tuple(summary([one] * 6) for one in medians)
    return Outcome(status=Status.OK, worst_error=0.1, timings=timings)


@dataclass(frozen=True, slots=True)
class Told:
    """Writes every finished trial's mark to a pipe, after the tuner has heard of it."""

    descriptor: int

    def task_started(self, task: Task, trials: int) -> None: ...

    def trial_done(self, task: Task, trial: Record, best_us: float | None) -> None:  # noqa: ARG002
        os.write(self.descriptor, f"{mark(trial)}\n".encode())

    def proving(self, task: Task, count: int) -> None: ...

    def task_done(self, task: Task, winners: Sequence[Entry]) -> None: ...


def mark(trial: Record) -> str:
    return digest(trial.spec, trial.workload, trial.plan)


@dataclass(slots=True)
class Losses:
    kills: int = 0
    ends: int = 0
    finished: int = 0
    lost: int = 0
    repeated: int = 0
    corrupt: int = 0


@click.command("endurance", help=HELP, short_help="A tuning run killed at random instants.")
@click.option("--kills", default=200, show_default=True, type=click.IntRange(min=1))
@click.option("--seed", default=0, show_default=True, help="Of the instants.")
@click.option("--save", is_flag=True, help="Write the answer to benchmarks/results/<processor>/ of this checkout.")
def command(kills: int, seed: int, save: bool) -> None:
    arch = cpu_info.detect(measure=False)
    load = report.load_average()
    with tempfile.TemporaryDirectory() as folder:
        losses = endure(Path(folder), kills, seed)
    click.echo(
        f"{losses.kills} kills, {losses.ends} runs that ended first; {losses.finished} trials finished, "
        f"{losses.lost} lost, {losses.repeated} made twice; {losses.corrupt} corrupt files"
    )
    if save:
        whole = {**report.header("endurance", arch, load), "label": "pretended trials", **dataclasses.asdict(losses)}
        report.write_json(report.saved_path(arch, "endurance"), whole)


def endure(folder: Path, kills: int, seed: int) -> Losses:
    """Runs and kills until `kills` of them were killed, each on what the ones before it left."""
    instants, losses = random.Random(seed), Losses()
    told: set[str] = set()  # of this generation
    generation = 0
    while losses.kills < kills:
        place = folder / str(generation)
        marks, killed = one_life(place, instants.uniform(0.0, LONGEST_LIFE_S), seed=generation)
        losses.kills += killed
        losses.ends += not killed
        losses.finished += len(marks - told)
        told |= marks
        kept = [mark(trial) for trial in record.read(records_of(place))]
        losses.lost += len(told - set(kept))
        losses.corrupt += corrupt_files(place)
        if not killed:  # its searches are done: another generation starts from nothing
            losses.repeated += len(kept) - len(set(kept))
            generation += 1
            told = set()
    return losses


def records_of(place: Path) -> Path:
    return place / "cache" / "records" / "cpu" / f"{HEADS.name}.jsonl"


def corrupt_files(place: Path) -> int:
    """Packs that do not load, and studies that do not open."""
    damaged = sum(_is_damaged(path) for path in (place / "packs").glob("*/*.json"))
    if (place / "studies.log").exists():
        try:
            open_storage(f"journal:{place / 'studies.log'}").get_all_studies()
        except (ValueError, KeyError):
            damaged += 1
    return damaged


def _is_damaged(path: Path) -> bool:
    try:
        pack.load(path)
    except PackError:
        return True
    return False


def one_life(place: Path, seconds: float, seed: int) -> tuple[set[str], bool]:
    """The marks of the trials that one run finished, and whether it was killed before it ended."""
    heard, tells = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(heard)
        try:
            run_once(place, tells, seed)
        finally:
            os._exit(0)
    os.close(tells)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    with os.fdopen(heard) as pipe:
        lines = pipe.read().split("\n")
    return set(lines[:-1]), os.WIFSIGNALED(status)


def run_once(place: Path, tells: int, seed: int) -> None:
    os.environ.update(SPECATTN_CACHE_DIR=str(place / "cache"))
    arch = dataclasses.replace(cpu_info.detect(measure=False), bandwidth_gbs=10.0, fp32_tflops=0.1, bf16_tflops=0.1)
    target = Target(arch=arch, backend="cpu", is_present=True, page_size=16)
    tasks = [Task(spec=SPEC, workloads=(size,)) for size in SIZES]
    method = Method(storage=open_storage(f"journal:{place / 'studies.log'}"), workforce=Pretended())
    tune(tasks, target, Budget(trials=25, seed=seed), Told(tells), place / "packs", method)
