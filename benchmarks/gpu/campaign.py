"""The campaign from outside: a folder, a clock, and a process that is started anew when what it asked killed it.

Knows no question and imports no torch, so that it outlives whatever a device does to a process.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu import CHECKOUT, journal
from benchmarks.gpu.journal import Journal
from specattn_codegen.errors import SpecError

STAGES = ("ceilings", "correctness", "graphs", "tuning", "model", "peers", "rounds")
GRACE_S = 8.0  # for a step that outlives its estimate; then it is cut, and counts as begun
# Exit codes of the process that asks.
REFUSED = 2  # it cannot begin
TIME_SHORT = 3  # it has asked what there was time for
POISONED = 75  # the device refuses this process, and a new one may go on (sysexits.h, EX_TEMPFAIL)
KIND = "campaign"  # the journal's first fact: what the folder holds


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """out: where results go; resume: an archive to go on from; minutes: of wall time, for everything."""

    out: Path
    minutes: float
    stages: Sequence[str]
    resume: Path | None
    is_rehearsal: bool


def run(asked: Asked) -> bool:
    """Runs what time allows and packs it. Whether every step of the stages asked for is settled. Raises SpecError."""
    ends_at = time.time() + 60.0 * asked.minutes
    book = _open(asked)
    code = POISONED
    while code not in (0, TIME_SHORT) and time.time() < ends_at:
        before = len(book.facts())
        code = _child(asked, book.revision, ends_at)
        if code == REFUSED or (code not in (0, TIME_SHORT) and len(book.facts()) == before):
            raise SpecError(f"the campaign cannot begin (exit code {code}); what is above says why")
    journal.pack(asked.out)
    return code == 0


def _open(asked: Asked) -> Journal:
    unknown = [name for name in asked.stages if name not in STAGES]
    if unknown or not asked.stages:
        raise SpecError(f"--stages {','.join(asked.stages)}: must be of {','.join(STAGES)}")
    if not asked.minutes > 0:
        raise SpecError(f"--minutes {asked.minutes:g}: must be above 0")
    try:
        asked.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SpecError(f"--out {asked.out}: cannot be written ({error.strerror}); choose another folder") from error
    if asked.resume is not None and not (asked.out / journal.JOURNAL).exists():
        journal.unpack(asked.resume, asked.out)
    book = Journal(folder=asked.out, revision=journal.revision())
    kind = {"rehearsal": asked.is_rehearsal}
    known = book.answers()
    if known.get(KIND, kind) != kind:
        what = "a rehearsal's" if known[KIND]["rehearsal"] else "a GPU's"
        raise SpecError(f"--out {asked.out}: holds {what} results, which do not mix; choose another folder")
    if KIND not in known:
        book.done(KIND, 0.0, kind)
    return book


def _child(asked: Asked, revision: str, ends_at: float) -> int:
    """Runs the stages in a process of its own session, until the end of the time. Its exit code."""
    command = [sys.executable, "-m", "benchmarks.gpu.child", "--out", str(asked.out.resolve()), "--revision", revision]
    command += ["--ends-at", f"{ends_at:.3f}", "--stages", ",".join(asked.stages)]
    command += ["--rehearse"] if asked.is_rehearsal else []
    variables = {**os.environ, "SPECATTN_CONFIG_DIR": str((asked.out / "packs").resolve()), "PYTHONUNBUFFERED": "1"}
    variables["PYTHONPATH"] = os.pathsep.join(entry for entry in sys.path if entry)
    variables.pop("TRITON_INTERPRET", None)
    if asked.is_rehearsal:
        variables["TRITON_INTERPRET"] = "1"
    process = subprocess.Popen(command, cwd=CHECKOUT, env=variables, start_new_session=True)
    try:
        return process.wait(timeout=max(0.0, ends_at + GRACE_S - time.time()))
    except subprocess.TimeoutExpired:
        print("time is up: the step under way is cut", flush=True)
        return TIME_SHORT
    finally:  # its workers too, which are sessions of their own and die with it
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
