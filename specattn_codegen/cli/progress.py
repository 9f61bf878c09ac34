"""What a tuning run shows: bars on a terminal, one line per search elsewhere, and the closing table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from specattn_codegen.packs import pack_file
from specattn_codegen.packs.pack import Entry
from specattn_codegen.tuning.outcome import Outcome, Status
from specattn_codegen.tuning.record import Record
from specattn_codegen.tuning.tune_session import Task

PLAIN_WIDTH = 160  # columns where the output is a file or a pipe


def console() -> Console:
    """For stdout: colours and control codes on a terminal only."""
    found = Console(highlight=False)
    return found if found.is_terminal else Console(highlight=False, width=PLAIN_WIDTH)


def say(line: str) -> None:
    """A line as it is, however wide, without what a terminal would obey."""
    console().print(pack_file.printable(line), markup=False, soft_wrap=True)


class TuningProgress:
    """Listens to a tuning run of `num_tasks` searches and shows it. Keeps the winners for the closing table."""

    def __init__(self, console: Console, num_tasks: int) -> None:
        self.winners: list[Entry] = []
        self.trials: list[tuple[Task, Record]] = []
        self._console = console
        self._num_tasks = num_tasks
        self._done = 0
        self._failed = 0
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._all = self._bars.add_task("all searches", total=num_tasks, note="")
        self._current = self._bars.add_task("", total=None, note="", visible=False)

    @property
    def unfinished(self) -> int:
        """Searches not done yet."""
        return self._num_tasks - self._done

    def __enter__(self) -> TuningProgress:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def task_started(self, task: Task, trials: int) -> None:
        self._failed = 0
        self._bars.reset(self._current, description=task.name, total=trials, note="", visible=True)
        self._bars.update(self._all, note=f"{trials} trials each at most")

    def trial_done(self, task: Task, trial: Record, best_us: float | None) -> None:
        self.trials.append((task, trial))
        self._failed += trial.outcome.status is not Status.OK
        best = "" if best_us is None else f"best {microseconds(best_us)}"
        failed = f", {self._failed} failed" if self._failed else ""
        self._bars.update(self._current, advance=1, note=best + failed)

    def proving(self, task: Task, count: int) -> None:
        self._bars.update(self._current, description=f"{task.name}: proving {count}")

    def task_done(self, task: Task, winners: Sequence[Entry]) -> None:
        self.winners.extend(winners)
        self._done += 1
        self._bars.update(self._all, completed=self._done)
        if not self._console.is_terminal:
            found = ", ".join(f"{entry.workload.name} {microseconds(entry.latency_us)}" for entry in winners)
            line = f"[{self._done}/{self._num_tasks}] {task.spec.name}: {found or 'nothing proved'}"
            self._console.print(line, markup=False, soft_wrap=True)


def microseconds(value: float) -> str:
    return f"{value / 1e3:.2f} ms" if value >= 1e4 else f"{value:.1f} us"


def closing_table(entries: Sequence[Entry]) -> Table:
    """op, workload, plan, time, share of the ceiling, and how the time is known; a plan is spelled out once."""
    table = Table(box=box.SIMPLE)
    table.add_column("op", overflow="fold")  # gives way on a narrow terminal, so that no figure has to
    table.add_column("workload", no_wrap=True)
    table.add_column("plan")
    for title in ("time", "of ceiling"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("label", no_wrap=True)
    for above, entry in zip((None, *entries), entries, strict=False):
        same_plan = above is not None and above.spec == entry.spec and above.plan == entry.plan
        table.add_row(
            entry.spec.name,
            entry.workload.name,
            "  as above" if same_plan else short_plan(entry),
            microseconds(entry.latency_us),
            f"{entry.share_of_ceiling:.0%}",
            entry.chosen_by,
        )
    return table


def doubts(outcomes: Sequence[Outcome]) -> list[str]:
    """What went on while kernels were timed that makes their times doubtful, and how often."""
    seen = [outcome.conditions for outcome in outcomes if outcome.conditions]
    troubles = Counter(trouble for conditions in seen for trouble in conditions.troubles)
    return [f"doubtful: {trouble} during {count} of {len(seen)} timings" for trouble, count in troubles.most_common()]


def short_plan(entry: Entry) -> str:
    return " ".join(f"{name}={value}" for name, value in entry.plan.settings)


def closing_lines(packs: Sequence[Path], device: str, entries: Sequence[Entry]) -> list[str]:
    """What the times and results are worth, and where the packs are."""
    meaning = {
        "measured": f"measured: timed on {device}, after their results agreed with the float64 oracle",
        "modelled": f"modelled: compiled for {device}, which is not here, ranked by the cost model; nothing was timed",
    }
    proofs = Counter(entry.proved_by for entry in entries)
    return [
        *(meaning[label] for label in sorted({entry.chosen_by for entry in entries})),
        "proved by: " + ", ".join(f"{proof} ({count})" for proof, count in sorted(proofs.items())),
        *(f"pack: {path}" for path in packs),
    ]
