"""Outcome: what became of one candidate. A failing candidate is data; only bugs are exceptions."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from specattn_codegen.build.resources import Resources

DIED = "the worker "  # how the detail of an outcome begins whose worker did not survive it
HUNG = "no result after "  # and of one whose worker had to be killed
POISONED = "the device failed: "  # and of one after which its worker's device takes nothing more


class Status(str, Enum):
    """ok, or the stage a candidate failed at."""

    OK = "ok"
    INVALID = "invalid"
    COMPILE = "compile"
    RUNTIME = "runtime"
    WRONG = "wrong"
    TIMEOUT = "timeout"


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Microseconds of one call: median, the 20th and 80th percentile, and over how many calls."""

    median_us: float
    p20_us: float
    p80_us: float
    n: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a worker sends back.

    detail       why the candidate failed, or what the check found
    worst_error  largest error as a multiple of its tolerance, None where nothing was checked
    timings      one per kernel that was timed; empty unless the status is ok
    resources    read from the binary; empty where the backend has none to read
    """

    status: Status
    detail: str = ""
    worst_error: float | None = None
    timings: tuple[Timing, ...] = ()
    resources: tuple[Resources, ...] = ()
