"""Command-line options that several questions share, and what they mean."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import click

from specattn_bench.report import require_writable, saved_path
from specattn_codegen import gpus, models
from specattn_codegen.arch import Arch
from specattn_codegen.errors import SpecError
from specattn_codegen.heads import HeadConfig
from specattn_codegen.spec import DTYPES

Command = TypeVar("Command", bound=Callable[..., object])
PICTURES = (".png", ".svg", ".pdf")


def shared(command: Command) -> Command:
    """--heads, --dtype, --page-size, --seconds, --threads, --plan, --plans, --json, --plot and --save."""
    for option in reversed(OPTIONS):
        command = option(command)
    return command


OPTIONS = (
    click.option("--heads", default="32,8,128", show_default=True, metavar="HQ,HKV,D", help="Heads and their dim."),
    click.option(
        "--dtype",
        "dtypes",
        multiple=True,
        type=click.Choice(DTYPES),
        help="May be repeated.  [default: float32, bfloat16]",
    ),
    click.option("--page-size", default=16, show_default=True, type=click.IntRange(min=1), help="Keys per page."),
    click.option("--seconds", default=12.0, show_default=True, help="Timing of one case, all its series together."),
    click.option("--threads", type=click.IntRange(min=1), help="CPU threads.  [default: all]"),
    click.option("--plan", "plan", multiple=True, metavar="NAME=VALUE", help="Override a setting; may be repeated."),
    click.option(
        "--plans",
        "plan_source",
        type=click.Choice(("tuned", "default")),
        default="tuned",
        show_default=True,
        help="Plans from packs, as a loaded kernel finds them, or the safe defaults.",
    ),
    click.option(
        "--json", "json_path", type=click.Path(path_type=Path), metavar="PATH", help="Write the results here."
    ),
    click.option(
        "--plot", "plot_path", type=click.Path(path_type=Path), metavar="PATH", help="Draw them: .png or .svg."
    ),
    click.option("--save", is_flag=True, help="Write them to benchmarks/results/<processor>/ of this checkout."),
)


def heads_of(text: str) -> HeadConfig:
    return HeadConfig(**models.parse_heads(text))


def gpus_named(names: Sequence[str]) -> tuple[Arch, ...]:
    """GPUs to model; `all` stands for every known one. Raises SpecError."""
    if "cpu" in names:
        raise SpecError("--gpu cpu: the CPU is here and is measured; leave --gpu out")
    wanted = gpus.names() if "all" in names else names
    return tuple(dict.fromkeys(gpus.find(name) for name in wanted))


def require_seconds(seconds: float) -> float:
    if not 0 < seconds < float("inf"):
        raise SpecError(f"--seconds {seconds:g}: must be above 0")
    return seconds


def report_paths(question: str, arch: Arch, json_path: Path | None, *, save: bool) -> list[Path]:
    """Where the JSON goes; every place is tried before anything is timed."""
    paths = [json_path] if json_path else []
    if json_path:
        require_writable(json_path, "--json")
    if save:
        kept = saved_path(arch, question)
        require_writable(kept, "--save")
        paths.append(kept)
    return paths


def require_picture(path: Path | None) -> None:
    if path is None:
        return
    if path.suffix.lower() not in PICTURES:
        raise SpecError(f"--plot {path}: must end in {', '.join(PICTURES)}")
    require_writable(path, "--plot")
