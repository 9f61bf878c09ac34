"""The session: the processor that answers, and how it is timed and captured. Knows no question."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.gpu import sizes
from benchmarks.gpu.journal import Answer, Journal
from benchmarks.gpu.sizes import PAGE_SIZE, Sizes
from specattn_codegen.plan import Backend
from specattn_codegen.processors import cpu_info, gpu_detect
from specattn_codegen.processors.arch import Arch
from specattn_codegen.space import backends_for
from specattn_codegen.tuning import measure
from specattn_codegen.tuning.measure import Launch, Timer, device_of
from specattn_codegen.tuning.outcome import Timing
from specattn_codegen.tuning.tune_session import Target

NOT_A_GPU = "a rehearsal on a CPU: no time here is a GPU's"


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One thing to find out.

    key      names it once and for all: what is in the journal is not asked again
    seconds  it may take; with less left it is not begun
    run      finds it out
    """

    key: str
    seconds: float
    run: Callable[[], Answer]


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """arch is the GPU at hand, or in a rehearsal the CPU in its place."""

    journal: Journal
    arch: Arch
    sizes: Sizes

    @classmethod
    def open(cls, folder: Path, revision: str, *, rehearsal: bool) -> Session:
        """Raises SpecError where there is no GPU and it is no rehearsal."""
        arch = cpu_info.detect(measure=False) if rehearsal else gpu_detect.local()
        asked = sizes.rehearsed() if rehearsal else sizes.on_gpu()
        return cls(journal=Journal(folder=folder, revision=revision), arch=arch, sizes=asked)

    @property
    def is_rehearsal(self) -> bool:
        return not self.arch.is_gpu

    @property
    def device(self) -> str:
        return device_of(self.arch)

    @property
    def target(self) -> Target:
        """Every backend of the processor that is installed, the usual one first."""
        served = backends_for(self.arch)
        further: tuple[Backend, ...] = tuple(one for one in served[1:] if importlib.util.find_spec(one))
        return Target(arch=self.arch, backend=served[0], is_present=True, page_size=PAGE_SIZE, further=further)

    def label(self, answer: Answer) -> dict[str, object]:
        """An answer that says what it is not."""
        return {**answer, "note": NOT_A_GPU} if self.is_rehearsal else dict(answer)

    def time(self, *launches: Launch) -> tuple[Timing, ...]:
        """In turns, behind a cleared L2."""
        timer: Timer = measure.timer_for(self.arch)
        with torch.inference_mode():
            return measure.time_interleaved(launches, seconds=self.sizes.seconds * len(launches), timer=timer)

    def captured(self, launch: Launch) -> Launch:
        """One CUDA graph of what `launch` does; the launch itself where there is no GPU."""
        return launch if self.is_rehearsal else measure.captured(launch)

    def release(self) -> None:
        """Gives memory that nothing refers to back to the device, so that the next large thing fits."""
        if not self.is_rehearsal:
            torch.cuda.empty_cache()


Steps = Generator[Step, None, None]
