"""Worker processes: real hangs, real crashes, real kills."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from specattn_codegen.errors import BuildError, SpecError
from specattn_codegen.tuning.outcome import Outcome, Status
from specattn_codegen.tuning.worker import WorkerError, WorkerPool


@dataclass(frozen=True)
class Answer:
    """Sends back its text and the process it ran in."""

    text: str

    def run(self) -> Outcome:
        return Outcome(status=Status.OK, detail=f"{self.text} {os.getpid()}")


@dataclass(frozen=True)
class Hang:
    """Never returns, and neither does the child it started, whose process id it writes down."""

    note: Path

    def run(self) -> Outcome:
        child = subprocess.Popen(["sleep", "600"])
        self.note.write_text(str(child.pid))
        while True:
            signal.pause()


@dataclass(frozen=True)
class Die:
    number: int

    def run(self) -> Outcome:
        os.kill(os.getpid(), self.number)
        raise AssertionError("a killed process goes no further")


@dataclass(frozen=True)
class Leave:
    code: int

    def run(self) -> Outcome:
        os._exit(self.code)


@dataclass(frozen=True)
class Refuse:
    error: type[Exception]

    def run(self) -> Outcome:
        raise self.error("key_tile=7: must be a power of two")


@dataclass(frozen=True)
class Fail:
    """A device error that leaves the process unusable."""

    def run(self) -> Outcome:
        return Outcome(status=Status.RUNTIME, detail=f"illegal address {os.getpid()}")


@dataclass(frozen=True)
class Variable:
    name: str

    def run(self) -> Outcome:
        return Outcome(status=Status.OK, detail=os.environ.get(self.name, "unset"))


@dataclass(frozen=True)
class WaitFor:
    """Returns once a file has something in it."""

    note: Path

    def run(self) -> Outcome:
        while not (self.note.exists() and self.note.read_text()):
            time.sleep(0.05)
        return Outcome(status=Status.OK)


@dataclass(frozen=True)
class Unreadable:
    """Pickles here and cannot be read there."""

    def __reduce__(self) -> tuple[type[int], tuple[str]]:
        return int, ("seven",)

    def run(self) -> Outcome:
        raise AssertionError("never read")


def gone(pid: int) -> bool:
    """Whether a process has ended, a zombie counting as ended; waits up to five seconds for it."""
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


def test_a_hang_is_killed_at_its_deadline_with_its_children_and_the_pool_goes_on(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    with WorkerPool(size=1, deadline_s=1.0) as pool:
        outcomes = [outcome for _, outcome in pool.run([Hang(note), Answer("after")])]
    assert [outcome.status for outcome in outcomes] == [Status.TIMEOUT, Status.OK]
    assert outcomes[0].detail == "no result after 1 s"
    assert outcomes[1].detail.startswith("after")
    assert gone(int(note.read_text()))


def test_crashes_are_data_and_the_pool_goes_on() -> None:
    jobs = [Die(signal.SIGSEGV), Leave(3), Answer("still here"), Refuse(BuildError)]
    with WorkerPool(size=1, deadline_s=30.0) as pool:
        outcomes = [outcome for _, outcome in pool.run(jobs)]
    assert [outcome.status for outcome in outcomes] == [Status.RUNTIME, Status.RUNTIME, Status.OK, Status.COMPILE]
    assert outcomes[0].detail == "the worker was killed by SIGSEGV"
    assert outcomes[1].detail == "the worker left with exit code 3"
    assert outcomes[3].detail == "key_tile=7: must be a power of two"


def test_a_process_serves_many_jobs_until_one_fails_at_run_time() -> None:
    with WorkerPool(size=1, deadline_s=30.0) as pool:
        details = [outcome.detail for _, outcome in pool.run([Answer("a"), Answer("b"), Fail(), Answer("c")])]
    first, second, failed, after = (detail.split()[-1] for detail in details)
    assert first == second == failed
    assert after != failed


@pytest.mark.parametrize(("job", "names"), [(Refuse(TypeError), "TypeError: key_tile=7"), (Unreadable(), "ValueError")])
def test_a_bug_escapes_with_its_traceback(job: Refuse | Unreadable, names: str) -> None:
    with WorkerPool(size=1, deadline_s=30.0) as pool, pytest.raises(WorkerError, match=names):
        list(pool.run([job]))


def test_a_mistake_of_the_caller_is_not_a_failing_candidate() -> None:
    with WorkerPool(size=1, deadline_s=30.0) as pool, pytest.raises(SpecError, match="key_tile=7"):
        list(pool.run([Refuse(SpecError)]))


def test_the_environment_is_the_workers_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECATTN_TEST_GIVEN", "parent")
    monkeypatch.setenv("SPECATTN_TEST_TAKEN", "parent")
    variables = {"SPECATTN_TEST_GIVEN": "worker", "SPECATTN_TEST_TAKEN": None}
    with WorkerPool(size=1, deadline_s=30.0, environment=variables) as pool:
        seen = [outcome.detail for _, outcome in pool.run(map(Variable, variables))]
    assert seen == ["worker", "unset"]
    assert os.environ["SPECATTN_TEST_GIVEN"] == "parent"


def test_jobs_are_drawn_only_when_a_worker_is_free() -> None:
    drawn: list[int] = []

    def jobs() -> Iterator[Answer]:
        for number in range(3):
            drawn.append(number)
            yield Answer(str(number))

    with WorkerPool(size=1, deadline_s=30.0) as pool:
        seen = [(job.text, len(drawn)) for job, _ in pool.run(jobs())]
    assert seen == [("0", 1), ("1", 2), ("2", 3)]


def test_a_caller_that_stops_early_leaves_nothing_running(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    with WorkerPool(size=2, deadline_s=60.0) as pool:
        results = pool.run([Hang(note), WaitFor(note)])
        assert next(results)[0] == WaitFor(note)
        results.close()
        assert gone(int(note.read_text()))
        assert [outcome.status for _, outcome in pool.run([Answer("again")])] == [Status.OK]
