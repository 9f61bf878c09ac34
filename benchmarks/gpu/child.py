"""The process that asks: every stage in turn, each step once. It may die of it; campaign.py starts it anew."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from benchmarks.gpu import ceilings, correctness, end_to_end, graphs, journal, model, peers, tuning
from benchmarks.gpu.campaign import POISONED, REFUSED, TIME_SHORT
from benchmarks.gpu.session import Session, Step, Steps
from specattn_codegen.errors import SpecAttnError
from specattn_codegen.tuning.worker import die_with_parent

STAGES: Mapping[str, Callable[[Session], Steps]] = {  # by priority
    "ceilings": ceilings.steps,
    "correctness": correctness.steps,
    "graphs": graphs.steps,
    "tuning": tuning.steps,
    "model": model.steps,
    "peers": peers.steps,
    "rounds": end_to_end.steps,
}
STAGE_SECONDS = 460.0  # a stage that has not ended by then goes on in the next call


class Clock:
    """Seconds left of a campaign and of its stage. The campaign's end is a wall clock's, as its parent keeps it."""

    def __init__(self, ends_at: float, stage_seconds: float = STAGE_SECONDS) -> None:
        self._ends_at, self._stage_seconds = ends_at, stage_seconds
        self._stage_ends_at = ends_at

    def begin_stage(self) -> None:
        self._stage_ends_at = min(self._ends_at, time.time() + self._stage_seconds)

    @property
    def left(self) -> float:
        return self._stage_ends_at - time.time()


def say(text: str) -> None:
    print(text, flush=True)


def run_stages(session: Session, clock: Clock, names: list[str]) -> bool:
    """Whether every step is settled."""
    settled = True
    for name in names:
        clock.begin_stage()
        say(f"== {name}, {clock.left:.0f} s left for it")
        try:
            with contextlib.closing(STAGES[name](session)) as steps:
                for step in steps:
                    settled &= _take(session, clock, step)
        finally:
            journal.pack(session.journal.folder)
    return settled


def _take(session: Session, clock: Clock, step: Step) -> bool:
    """Takes a step unless it is settled. Whether it is now."""
    book = session.journal
    if book.is_settled(step.key):
        return True
    if clock.left < step.seconds:
        say(f"   {step.key}: not begun, it may take {step.seconds:.0f} s and {max(0.0, clock.left):.0f} s are left")
        return False
    if book.attempts(step.key) >= journal.MOST_ATTEMPTS:
        book.failed(step.key, 0.0, f"its process ended {journal.MOST_ATTEMPTS} times before it did")
        return True
    book.started(step.key)
    began = time.monotonic()
    try:
        answer = step.run()
    except Exception as error:  # noqa: BLE001 - one bug must not cost what else the device has to say
        book.failed(step.key, time.monotonic() - began, traceback.format_exc())
        say(f"   {step.key}: failed, {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        if isinstance(error, torch.AcceleratorError):
            sys.exit(POISONED)
    else:
        seconds = time.monotonic() - began
        book.done(step.key, seconds, answer)
        say(f"   {step.key}: {seconds:.1f} s")
    session.release()
    return True


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--revision", required=True)
    parser.add_argument("--ends-at", type=float, required=True)
    parser.add_argument("--stages", required=True)
    parser.add_argument("--rehearse", action="store_true")
    asked = parser.parse_args()
    die_with_parent()
    try:
        session = Session.open(asked.out, asked.revision, rehearsal=asked.rehearse)
    except SpecAttnError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(REFUSED)
    clock = Clock(asked.ends_at, float("inf") if asked.rehearse else STAGE_SECONDS)  # a CPU may be as slow as it is
    if not run_stages(session, clock, asked.stages.split(",")):
        sys.exit(TIME_SHORT)


if __name__ == "__main__":
    main()
