"""Where the time of a run goes, by phase."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass(slots=True)
class Stopwatch:
    """Adds up the seconds spent in each named phase, since the start or the last restart."""

    clock: Callable[[], float] = time.perf_counter
    phases: dict[str, float] = field(default_factory=dict)
    started: float = field(init=False)

    def __post_init__(self) -> None:
        self.started = self.clock()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        begun = self.clock()
        try:
            yield
        finally:
            self.phases[name] = self.phases.get(name, 0.0) + self.clock() - begun

    def restart(self) -> float:
        """Forgets every phase; returns the seconds since the last start."""
        now = self.clock()
        elapsed, self.started = now - self.started, now
        self.phases.clear()
        return elapsed

    @property
    def elapsed(self) -> float:
        return self.clock() - self.started
