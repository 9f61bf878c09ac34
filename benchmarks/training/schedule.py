"""What a run does when, as a share of its time. Knows numbers only."""

from __future__ import annotations

import math
from dataclasses import dataclass

WARM_UP = 0.02
LAST_RATE = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """From `start`, a share of the run's time, every step reads so many sequences of that length."""

    start: float
    length: int
    sequences: int


STAGES = (
    Stage(start=0.0, length=512, sequences=4),
    Stage(start=0.3, length=1024, sequences=2),
    Stage(start=0.6, length=2048, sequences=1),
    Stage(start=0.75, length=8192, sequences=1),
)


def stage_at(progress: float, stages: tuple[Stage, ...] = STAGES) -> Stage:
    return [stage for stage in stages if stage.start <= progress][-1]


def learning_rate(progress: float, highest: float) -> float:
    """A short rise to the highest, then half a cosine."""
    fallen = (progress - WARM_UP) / (1 - WARM_UP)
    if fallen < 0:
        return highest * max(progress / WARM_UP, 0.01)
    return highest * (LAST_RATE + (1 - LAST_RATE) * (1 + math.cos(math.pi * min(fallen, 1.0))) / 2)
