"""Conditions: what else a processor was doing while kernels were timed on it. Watches; never decides."""

from __future__ import annotations

import importlib
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Protocol

import torch

from specattn_codegen.processors.arch import Arch

LOOK_EVERY_S = 0.02  # a question to the driver takes some tens of microseconds, which the device then idles

# Bits of nvmlDeviceGetCurrentClocksEventReasons (NVML API reference), but for that of a GPU with nothing to do.
REASONS = {
    0x002: "clocks set by a user",
    0x004: "software power cap",
    0x008: "hardware slowdown",
    0x010: "sync boost",
    0x020: "software thermal slowdown",
    0x040: "hardware thermal slowdown",
    0x080: "power brake",
    0x100: "display clocks",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """Where nobody can say, None.

    clock_mhz        the lowest and the highest seen of the multiprocessors' clock
    slowed_by        why the driver held that clock down, at any time
    other_processes  most seen at once that computed on the same GPU
    pinned_cores     of the threads that a CPU's kernels ran on; none for threads that may move
    """

    clock_mhz: tuple[int, int] | None = None
    slowed_by: tuple[str, ...] | None = None
    other_processes: int | None = None
    pinned_cores: tuple[int, ...] = ()

    @property
    def troubles(self) -> tuple[str, ...]:
        """What makes a time doubtful, in words; a clock that a user has set does not."""
        slowed = tuple(reason for reason in self.slowed_by or () if reason != REASONS[0x002])
        others = self.other_processes or 0
        noun = "process" if others == 1 else "processes"
        return (*slowed, *((f"{others} other {noun} on the GPU",) if others else ()))


class Watch(Protocol):
    """Looks while kernels are timed."""

    def look(self) -> None:
        """Often enough between calls, never during one."""
        ...

    def seen(self) -> Conditions:
        """Since the watch began."""
        ...


def watch(arch: Arch) -> Watch:
    """Of the processor at hand. Without NVML, or its driver, a GPU's conditions are not known."""
    if not arch.is_gpu:
        return CpuWatch()
    nvml = driver() if arch.vendor == "nvidia" else None
    if nvml is None:
        return Blind()
    uuid = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid).removeprefix("GPU-")
    try:
        return GpuWatch(nvml, nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}"))
    except nvml.NVMLError:  # part of a GPU has a name of its own
        return Blind()


def driver(name: str = "pynvml") -> ModuleType | None:
    """NVML, initialised; None where the module or the driver's library is missing."""
    try:
        nvml = importlib.import_module(name)
    except ImportError:
        return None
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return None
    return nvml


class Blind:
    """Nobody to ask."""

    def look(self) -> None: ...

    def seen(self) -> Conditions:
        return Conditions()


class CpuWatch:
    """Asks the system where this process's threads may run."""

    def look(self) -> None: ...

    def seen(self) -> Conditions:
        return Conditions(pinned_cores=pinned_cores())


def pinned_cores() -> tuple[int, ...]:
    """Cores that a thread of this process is bound to."""
    if not hasattr(os, "sched_getaffinity"):
        return ()
    masks = [os.sched_getaffinity(int(thread.name)) for thread in Path("/proc/self/task").iterdir()]
    return tuple(sorted({core for mask in masks if len(mask) == 1 for core in mask}))


class GpuWatch:
    """Asks NVML about one GPU by its handle.

    Its processes are counted and not named: in a container their ids are the host's. One of them is this one.
    """

    def __init__(self, nvml: ModuleType, device: object, clock: Callable[[], float] = time.monotonic) -> None:
        self._nvml = nvml
        self._device = device
        self._clock = clock
        self._next = clock()
        self._clocks: list[int] = []
        self._reasons: list[int] = []
        self._processes: list[int] = []

    def look(self) -> None:
        if self._clock() < self._next:
            return
        self._next = self._clock() + LOOK_EVERY_S
        nvml = self._nvml
        self._keep(self._clocks, lambda: nvml.nvmlDeviceGetClockInfo(self._device, nvml.NVML_CLOCK_SM))
        self._keep(self._reasons, lambda: nvml.nvmlDeviceGetCurrentClocksEventReasons(self._device))
        self._keep(self._processes, lambda: len(nvml.nvmlDeviceGetComputeRunningProcesses(self._device)))

    def _keep(self, kept: list[int], ask: Callable[[], int]) -> None:
        """Some GPUs, and parts of one, answer some questions only."""
        try:
            kept.append(ask())
        except self._nvml.NVMLError:
            return

    def seen(self) -> Conditions:
        slowed = (name for bit, name in REASONS.items() if any(reasons & bit for reasons in self._reasons))
        return Conditions(
            clock_mhz=(min(self._clocks), max(self._clocks)) if self._clocks else None,
            slowed_by=tuple(slowed) if self._reasons else None,
            other_processes=max(0, max(self._processes) - 1) if self._processes else None,
        )
