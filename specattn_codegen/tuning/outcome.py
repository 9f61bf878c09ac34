"""Outcome: what became of one candidate. A failing candidate is data; only bugs are exceptions."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from specattn_codegen.build.resources import Resources
from specattn_codegen.processors.conditions import Conditions

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
    """One kernel's calls.

    median_us, p20_us, p80_us  of a call, over n calls
    low_us, high_us            where the median lies with 95 % confidence, by the bootstrap
    noise_floor                share by which the medians of every other block of calls differ: a kernel against itself
    """

    median_us: float
    low_us: float
    high_us: float
    p20_us: float
    p80_us: float
    n: int
    noise_floor: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a worker sends back.

    detail           why the candidate failed, or what the check found
    worst_error      largest error as a multiple of its tolerance, None where nothing was checked
    timings          one per kernel that was timed; empty unless the status is ok
    resources        read from the binary; empty where the backend has none to read
    workspace_bytes  of scratch memory that a call needs; 0 where nothing was timed
    conditions       of the timing; None where there was none
    """

    status: Status
    detail: str = ""
    worst_error: float | None = None
    timings: tuple[Timing, ...] = ()
    resources: tuple[Resources, ...] = ()
    workspace_bytes: int = 0
    conditions: Conditions | None = None
