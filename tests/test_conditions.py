"""What is watched while kernels are timed: a driver that answers by the book, one that is silent, and none."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from types import ModuleType
from typing import cast

import pytest

from specattn_codegen.cli.progress import doubts
from specattn_codegen.processors import conditions, cpu_info, gpus
from specattn_codegen.processors.conditions import LOOK_EVERY_S, REASONS, Blind, Conditions, GpuWatch, driver, watch
from specattn_codegen.tuning.measure import host_timer, time_interleaved
from specattn_codegen.tuning.outcome import Outcome, Status

DEVICE = object()
H100 = gpus.find("h100")


class FakeNvml:
    """NVML as its reference describes it, for one GPU whose state a test sets."""

    class NVMLError(Exception):
        pass

    NVML_CLOCK_SM = 1

    def __init__(self) -> None:
        self.clock_mhz, self.reasons, self.processes = 1980, 0x1, [object()]
        self.silent = set[str]()
        self.questions = 0

    def _answer(self, name: str, device: object, value: object) -> object:
        assert device is DEVICE
        self.questions += 1
        if name in self.silent:
            raise self.NVMLError(name)
        return value

    def nvmlDeviceGetClockInfo(self, device: object, kind: int) -> object:  # noqa: N802 - NVML's own name
        assert kind == self.NVML_CLOCK_SM
        return self._answer("clock", device, self.clock_mhz)

    def nvmlDeviceGetCurrentClocksEventReasons(self, device: object) -> object:  # noqa: N802
        return self._answer("reasons", device, self.reasons)

    def nvmlDeviceGetComputeRunningProcesses(self, device: object) -> object:  # noqa: N802
        return self._answer("processes", device, self.processes)


class Clock:
    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def watching(nvml: FakeNvml, clock: Clock) -> GpuWatch:
    return GpuWatch(cast(ModuleType, nvml), DEVICE, clock)


def test_the_range_of_the_clock_every_reason_and_the_most_others_are_kept() -> None:
    nvml, clock = FakeNvml(), Clock()
    gpu = watching(nvml, clock)
    states = ((1980, 0x1, 1), (1410, 0x4 | 0x20, 3), (1755, 0x0, 2))
    for nvml.clock_mhz, nvml.reasons, count in states:
        nvml.processes = [object()] * count
        gpu.look()
        clock.seconds += LOOK_EVERY_S
    seen = gpu.seen()
    assert seen == Conditions(
        clock_mhz=(1410, 1980),
        slowed_by=("software power cap", "software thermal slowdown"),
        other_processes=2,
    )
    assert seen.troubles == ("software power cap", "software thermal slowdown", "2 other processes on the GPU")


def test_it_looks_no_more_often_than_it_should() -> None:
    nvml, clock = FakeNvml(), Clock()
    gpu = watching(nvml, clock)
    for _ in range(100):
        gpu.look()
        clock.seconds += LOOK_EVERY_S / 10
    assert nvml.questions == 3 * 10


def test_what_a_gpu_does_not_say_is_unknown_and_what_it_says_is_kept() -> None:
    nvml = FakeNvml()
    nvml.silent = {"reasons", "processes"}
    gpu = watching(nvml, Clock())
    gpu.look()
    assert gpu.seen() == Conditions(clock_mhz=(1980, 1980))
    assert gpu.seen().troubles == ()


def test_a_clock_that_a_user_has_set_is_no_trouble() -> None:
    nvml = FakeNvml()
    nvml.reasons = 0x2
    gpu = watching(nvml, Clock())
    gpu.look()
    assert gpu.seen().slowed_by == ("clocks set by a user",)
    assert gpu.seen().troubles == ()


def test_a_run_says_what_makes_its_times_doubtful() -> None:
    hot = Conditions(slowed_by=(REASONS[0x40],), other_processes=0)
    crowded = Conditions(slowed_by=(REASONS[0x40],), other_processes=1)
    outcomes = [Outcome(status=Status.OK, conditions=seen) for seen in (hot, crowded, Conditions(), None)]
    assert doubts(outcomes) == [
        "doubtful: hardware thermal slowdown during 2 of 3 timings",
        "doubtful: 1 other process on the GPU during 1 of 3 timings",
    ]


def test_no_module_and_no_driver_are_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    assert driver("a_module_nobody_has") is None
    broken = ModuleType("broken_nvml")
    broken.NVMLError = FakeNvml.NVMLError  # pyright: ignore[reportAttributeAccessIssue]

    def refuse() -> None:
        raise FakeNvml.NVMLError("driver/library version mismatch")

    broken.nvmlInit = refuse  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "broken_nvml", broken)
    assert driver("broken_nvml") is None
    monkeypatch.setattr(conditions, "driver", lambda: None)
    blind = watch(H100)
    assert isinstance(blind, Blind)
    blind.look()
    assert blind.seen() == Conditions()


@pytest.mark.skipif(importlib.util.find_spec("pynvml") is None, reason="nvidia-ml-py is not installed")
def test_the_real_module_has_every_name_that_is_asked_for() -> None:
    nvml = importlib.import_module("pynvml")
    for name in ("nvmlInit", "nvmlDeviceGetHandleByUUID", *dir(FakeNvml)):
        if "nvml" in name.lower():
            assert hasattr(nvml, name), name
    assert nvml.nvmlClocksEventReasonGpuIdle == 0x1 not in REASONS
    for bit, constant in {0x4: "SwPowerCap", 0x20: "SwThermalSlowdown", 0x40: "HwThermalSlowdown"}.items():
        assert getattr(nvml, f"nvmlClocksEventReason{constant}") == bit in REASONS


PINNED = """
import torch
from specattn_codegen.processors.conditions import pinned_cores
torch.set_num_threads(2)
torch.ones(1 << 22).sum()
print(*pinned_cores())
"""


@pytest.mark.skipif(cpu_info.core_count() < 2, reason="one core: every thread is bound to it")
def test_threads_stay_on_cores_of_their_own_where_they_are_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    def cores() -> list[str]:
        return subprocess.run([sys.executable, "-c", PINNED], capture_output=True, text=True, check=True).stdout.split()

    assert cores() == []
    monkeypatch.setenv("OMP_PROC_BIND", "true")
    monkeypatch.setenv("OMP_PLACES", "cores")
    assert len(cores()) >= 2


def test_the_cpus_watch_sees_this_process() -> None:
    cpu = watch(cpu_info.detect(measure=False))
    time_interleaved([lambda: None], seconds=0.0, timer=host_timer, between=cpu.look)
    assert cpu.seen() == Conditions(pinned_cores=conditions.pinned_cores())
