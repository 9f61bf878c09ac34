"""What every question's answer is made of: the JSON around the results, where it is kept, and how a run is shown."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from specattn_codegen import environment
from specattn_codegen.cli.progress import console
from specattn_codegen.digest import to_plain
from specattn_codegen.errors import SpecError
from specattn_codegen.processors.arch import Arch

BENCHMARKS = Path(__file__).resolve().parent.parent
PROCESSOR = "this machine: "
WIDTH = 124


def processor(arch: Arch) -> str:
    return arch.source.removeprefix(PROCESSOR)


def device(arch: Arch) -> str:
    return f"{processor(arch)} ({arch.target}), {torch.get_num_threads()} threads"


def slug(processor: str) -> str:
    """A folder's name for a CPU, as in `cpu-intel-xeon-processor`."""
    words = re.sub(r"\([^)]*\)|@.*", " ", processor.removeprefix(PROCESSOR).lower())
    return "-".join(["cpu", *re.findall(r"[a-z0-9]+", words)])


def saved_path(arch: Arch, question: str) -> Path:
    """benchmarks/results/<device>/<question>.json of a checkout. Raises SpecError where there is no checkout."""
    return kept_path(slug(processor(arch)), question)


def kept_path(folder: str, name: str) -> Path:
    """benchmarks/results/<folder>/<name>.json of a checkout. Raises SpecError where there is no checkout."""
    if BENCHMARKS.name != "benchmarks" or not (BENCHMARKS.parent / "pyproject.toml").is_file():
        raise SpecError("--save: results are kept in a checkout's benchmarks/results; use --json PATH here")
    return BENCHMARKS / "results" / folder / f"{name}.json"


def load_average() -> float:
    """Processes that wanted a core over the last minute; ask before a run, which adds its own."""
    return round(os.getloadavg()[0], 2)


def header(question: str, arch: Arch, load: float) -> dict[str, object]:
    """Where the numbers of a report come from. load: the machine's before the run."""
    return {
        "question": question,
        "label": "measured",
        "processor": processor(arch),
        "target": arch.target,
        "cores": arch.num_sms,
        "threads": torch.get_num_threads(),
        "last_level_cache_bytes": arch.l2_bytes,
        "load_average_before": load,
        "environment": to_plain(environment.current("cpu", environment.device_name(arch))),
    }


def write_json(path: Path, report: Mapping[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n")


def require_writable(path: Path, option: str) -> None:
    """Finds out before minutes of timing, not after them."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        existed = path.exists()
        path.open("a").close()
        if not existed:
            path.unlink()
    except OSError as error:
        raise SpecError(f"{option} {path}: cannot be written ({error.strerror}); choose another file") from error


def screen() -> Console:
    """For stdout, wide enough for a table: a terminal that is narrower wraps lines rather than losing numbers."""
    found = console()
    return found if found.width >= WIDTH else Console(highlight=False, width=WIDTH)


class Bar:
    """A progress bar on a terminal. It is drawn when something happens and never in between: a thread that redraws
    would take its share of the cores that are being timed."""

    def __init__(self, steps: int) -> None:
        shown = console()
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=shown,
            transient=True,
            auto_refresh=False,
            disable=not shown.is_terminal,
        )
        self._task = self._progress.add_task("", total=steps)

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def say(self, what: str) -> None:
        self._progress.update(self._task, description=what, refresh=True)

    def advance(self) -> None:
        self._progress.update(self._task, advance=1, refresh=True)
