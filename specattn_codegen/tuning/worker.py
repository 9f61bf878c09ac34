"""Worker processes with a deadline: a candidate may hang, crash or poison a process, and the tuner goes on.

Knows nothing about kernels: a job is any picklable object whose `run()` returns an Outcome.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import connection
from types import TracebackType
from typing import Generic, Protocol, TypeVar

from specattn_codegen.errors import BuildError, CacheError, SpecAttnError, SpecError, is_of_the_disk
from specattn_codegen.tuning.outcome import DIED, HUNG, Outcome, Status

STARTUP_S = 180.0  # importing torch on a busy machine; a candidate's own deadline starts after it
PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Job(Protocol):
    """One unit of work. Raises BuildError where a compiler refused it; any other exception is a bug."""

    def run(self) -> Outcome: ...


JobType = TypeVar("JobType", bound=Job)


class WorkerError(RuntimeError):
    """An exception that is a bug of ours escaped in a worker; the message is its traceback."""


@dataclass(frozen=True, slots=True)
class _Ready:
    """The worker has started and may be given a job."""


@dataclass(frozen=True, slots=True)
class _Refused:
    """A caller's mistake that only the worker could see."""

    message: str


@dataclass(frozen=True, slots=True)
class _Full:
    """The disk took no more, which says nothing about the candidate."""

    message: str


@dataclass(frozen=True, slots=True)
class _Bug:
    text: str


_Message = _Ready | _Refused | _Full | _Bug | Outcome


@dataclass(slots=True, eq=False)
class _Worker(Generic[JobType]):
    """One process and the job it has; `deadline` is when its start or its job must be over."""

    process: subprocess.Popen[bytes]
    channel: connection.Connection
    job: JobType | None
    started: bool
    deadline: float


class WorkerPool(Generic[JobType]):
    """Runs jobs in up to `size` fresh interpreters, each the leader of its own session, so that a hung job dies
    with every compiler it started. A context manager: leaving it kills what still runs.

    deadline_s   seconds one job may take
    environment  variables the workers are born with, on top of this process's; None removes one
    """

    def __init__(self, *, size: int, deadline_s: float, environment: Mapping[str, str | None] | None = None) -> None:
        self._size = size
        self._deadline_s = deadline_s
        self._environment = dict(environment or {})
        self._workers: list[_Worker[JobType]] = []
        self._begun: list[JobType] = []

    def __enter__(self) -> WorkerPool[JobType]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in list(self._workers):
            self._kill(worker)

    def start(self, jobs: Sequence[JobType]) -> None:
        """Hands jobs to workers that are up and idle, and comes back at once. The next run yields them too."""
        for job in jobs:
            idle = next((worker for worker in self._workers if worker.job is None), None)
            if idle is None:
                self._begun.append(job)
            else:
                idle.job = job
                self._send(idle)

    def run(self, jobs: Iterable[JobType]) -> Generator[tuple[JobType, Outcome], None, None]:
        """Yields (job, outcome) as jobs finish; a caller that stops early kills what it did not wait for.

        A job is taken from `jobs` only when a worker is free for it, so the iterable may decide what comes next from
        what came back. Raises WorkerError for a bug in a job, SpecError for a mistake only the worker could
        see, and CacheError where the disk took no more.
        """
        begun, self._begun = self._begun, []
        waiting = itertools.chain(begun, jobs)
        exhausted = False
        try:
            while True:
                while not exhausted and len(self._busy()) < self._size:
                    job = next(waiting, None)
                    exhausted = job is None
                    if job is not None:
                        self._give(job)
                if not self._busy():
                    return
                yield from self._finished()
        finally:
            for worker in self._busy():
                self._kill(worker)

    def _busy(self) -> list[_Worker[JobType]]:
        return [worker for worker in self._workers if worker.job is not None]

    def _give(self, job: JobType) -> None:
        idle = next((worker for worker in self._workers if worker.job is None), None)
        if idle is None:
            self._start(job)
        else:
            idle.job = job
            self._send(idle)

    def _start(self, job: JobType) -> None:
        ours, theirs = socket.socketpair()
        variables = {**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
        for name, value in self._environment.items():
            variables.pop(name, None)
            if value is not None:
                variables[name] = value
        # Ctrl-C waits until the worker is among those that are killed at the end.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            process = subprocess.Popen(
                [sys.executable, "-c", f"from {__name__} import serve; serve({theirs.fileno()})"],
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
                stdin=subprocess.DEVNULL,
                env=variables,
            )
            theirs.close()
            channel = connection.Connection(ours.detach())
            self._workers.append(_Worker(process, channel, job, started=False, deadline=time.monotonic() + STARTUP_S))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _send(self, worker: _Worker[JobType]) -> None:
        # A worker that died while idle is noticed by the read that follows.
        with contextlib.suppress(BrokenPipeError):
            worker.channel.send(worker.job)
        worker.deadline = time.monotonic() + self._deadline_s

    def _finished(self) -> list[tuple[JobType, Outcome]]:
        """Waits until something happens; what finished by it, possibly nothing."""
        busy = self._busy()
        patience = min(worker.deadline for worker in busy) - time.monotonic()
        heard = connection.wait([worker.channel for worker in busy], timeout=max(0.0, patience))
        finished: list[tuple[JobType, Outcome]] = []
        for worker in busy:
            if worker.channel in heard:
                finished.extend(self._read(worker))
            elif worker.deadline <= time.monotonic():
                finished.append(self._time_out(worker))
        return finished

    def _read(self, worker: _Worker[JobType]) -> list[tuple[JobType, Outcome]]:
        """What a worker sent or died of; nothing when it has only just become ready and got its job."""
        try:
            message = worker.channel.recv()
        except (EOFError, ConnectionResetError):
            self._kill(worker)
            message = Outcome(status=Status.RUNTIME, detail=_how_it_died(worker.process.returncode))
        match message:
            case _Ready():
                worker.started = True
                self._send(worker)
                return []
            case _Bug(text):
                raise WorkerError(text)
            case _Refused(text):
                raise SpecError(text)
            case _Full(text):
                raise CacheError(text)
        if message.status is Status.RUNTIME and worker in self._workers:
            self._kill(worker)  # a device error may have poisoned the process
        return [(self._take_job(worker), message)]

    def _time_out(self, worker: _Worker[JobType]) -> tuple[JobType, Outcome]:
        self._kill(worker)
        detail = f"{HUNG}{self._deadline_s:g} s" if worker.started else f"no start within {STARTUP_S:g} s"
        return self._take_job(worker), Outcome(status=Status.TIMEOUT, detail=detail)

    @staticmethod
    def _take_job(worker: _Worker[JobType]) -> JobType:
        job, worker.job = worker.job, None
        if job is None:
            raise RuntimeError("a worker answered without having been given a job")
        return job

    def _kill(self, worker: _Worker[JobType]) -> None:
        """Ends a worker and everything it started. The session outlives its leader, so an exited one is killed too."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(worker.process.pid, signal.SIGKILL)
        worker.process.wait()
        worker.channel.close()
        self._workers.remove(worker)


def _how_it_died(code: int) -> str:
    if code < 0:
        return f"{DIED}was killed by {signal.Signals(-code).name}"
    return f"{DIED}left with exit code {code}"


def die_with_parent() -> None:
    """Has the kernel kill this process when the one that started it ends, however it ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def serve(descriptor: int) -> None:
    """A worker's whole life on one socket: jobs in, outcomes out, until the other end closes."""
    os.set_inheritable(descriptor, False)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent()
    channel = connection.Connection(descriptor)
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):  # whoever started it has gone
        channel.send(_Ready())
        while True:
            channel.send(_attempt(channel.recv_bytes()))


def _attempt(pickled_job: bytes) -> _Message:
    try:
        job: Job = pickle.loads(pickled_job)  # noqa: S301 - from our parent, over our own socket
        return job.run()
    except (BuildError, OSError) as error:
        if is_of_the_disk(error):
            return _Full(str(error))
        if isinstance(error, BuildError):
            return Outcome(status=Status.COMPILE, detail=str(error))
        return _Bug(traceback.format_exc())
    except SpecAttnError as error:
        return _Refused(str(error))
    except Exception:  # noqa: BLE001 - not handled here: carried to the parent, which raises it
        return _Bug(traceback.format_exc())
