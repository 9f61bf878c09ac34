"""Studies that several processes search together, on Optuna's own storages: a journal file, a database, a gRPC proxy.

A trial under way belongs to a worker. One whose worker is gone is marked as failed, so that its plan is tried again.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import importlib
import os
import socket
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import optuna
from filelock import FileLock
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.storages import BaseStorage, GrpcStorageProxy, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from specattn_codegen.errors import SharingError, SpecError

# Names of a trial's attributes. The plan is for people: parameters are positions on the axes.
WORKER, PLAN, NOTE, FAILED, REFUSED = "worker", "plan", "note", "failed", "refused"
LOST_AFTER_S = 900.0  # a trial of another machine that has been under way for this long is taken to be lost
GRPC_PORT = 13000  # Optuna's own default


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """One study by name. worker: who this process is, as in `host:pid:start`."""

    storage: BaseStorage
    name: str
    worker: str

    def open(self, sampler: optuna.samplers.BaseSampler) -> optuna.Study:
        """Joins the study, or starts it; trials whose workers are gone are given up first."""
        study = optuna.create_study(storage=self.storage, study_name=self.name, sampler=sampler, load_if_exists=True)
        reap(study)
        return study

    def turns(self) -> contextlib.AbstractContextManager[object]:
        """In which one process asks at a time. SQLite locks no rows, so two that ask at once may get one trial there: a
        file beside the database keeps them apart. May be entered again by who is in it."""
        if isinstance(self.storage, RDBStorage) and self.storage.engine.dialect.name == "sqlite":
            return FileLock(f"{self.storage.engine.url.database}.lock")
        return contextlib.nullcontext()


def reap(study: optuna.Study) -> int:
    """Fails the trials whose workers are gone; how many there were."""
    lost = [trial for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)) if is_lost(trial)]
    for trial in lost:
        study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
    return len(lost)


def is_lost(trial: FrozenTrial) -> bool:
    """Whether the worker of a trial that is under way is gone, or must be taken to be."""
    host, _, process = str(trial.user_attrs.get(WORKER, "")).partition(":")
    pid, _, start = process.partition(":")
    if host == socket.gethostname() and start:
        return _start_of(int(pid)) != start
    if trial.datetime_start is None:
        return True
    return (dt.datetime.now() - trial.datetime_start).total_seconds() > LOST_AFTER_S


def worker_name() -> str:
    """Host, process and when it began, where the system says, since process ids are used again."""
    return f"{socket.gethostname()}:{os.getpid()}:{_start_of(os.getpid()) or ''}"


def _start_of(pid: int) -> str | None:
    """When a process began, in clock ticks since boot; None for one that is gone or only waits to be collected."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] == "Z" else fields[19]


@contextlib.contextmanager
def storage_at(url: str) -> Iterator[BaseStorage]:
    """As open_storage, with its connections closed at the end. A storage that fails in between raises SharingError."""
    storage = open_storage(url)
    try:
        yield storage
    except errors_of(storage) as error:
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise SharingError(
            f"--storage {url}: failed ({reason}); winners so far are in the pack. Start the same command again once it "
            "works: what was tried is not tried twice"
        ) from error
    finally:
        storage.remove_session()
        if isinstance(storage, RDBStorage):
            storage.engine.dispose()


class MendingLock(JournalFileSymlinkLock):
    """Optuna's lock of a journal file. Whoever has it takes away what a full disk or a kill has left of a last line, as
    Optuna reads no journal in which another line follows such a one."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self._journal = path

    def acquire(self) -> bool:
        super().acquire()
        with self._journal.open("rb+") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 1))
            if file.read(1) not in (b"", b"\n"):
                file.truncate(self._journal.read_bytes().rfind(b"\n") + 1)
        return True


def errors_of(storage: BaseStorage) -> tuple[type[Exception], ...]:
    """What a storage may raise because it is full, gone or out of reach."""
    if isinstance(storage, GrpcStorageProxy):
        return (importlib.import_module("grpc").RpcError,)  # an extra, which Optuna has imported by now
    return (OSError, StorageInternalError, SQLAlchemyError)


def open_storage(url: str) -> BaseStorage:
    """journal:PATH; grpc://HOST:PORT; or a database URL as SQLAlchemy takes it, as in sqlite:///PATH or
    postgresql+psycopg://USER@HOST/NAME. Raises SpecError."""
    parts = urlsplit(url)
    if parts.scheme == "journal":
        path = Path(url.removeprefix("journal:").removeprefix("//")).expanduser()
        if not path.name:
            raise SpecError(f"--storage {url}: names no file; as in journal:studies.log")
        path.parent.mkdir(parents=True, exist_ok=True)
        return JournalStorage(JournalFileBackend(str(path), MendingLock(path)))
    if parts.scheme == "grpc":
        with warnings.catch_warnings():  # its interface may change, which is for us to follow
            warnings.simplefilter("ignore", ExperimentalWarning)
            return GrpcStorageProxy(host=parts.hostname or "localhost", port=parts.port or GRPC_PORT)
    if not parts.scheme:
        raise SpecError(f"--storage {url}: must be journal:PATH, grpc://HOST:PORT or a database URL")
    try:
        return RDBStorage(url)
    except (SQLAlchemyError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise SpecError(f"--storage {url}: cannot be opened ({reason})") from error
