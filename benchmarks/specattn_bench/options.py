"""Command-line options that several questions share, and what they mean."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import torch

from specattn_bench.plans import Plans, PlanSource, parse_overrides
from specattn_bench.report import require_writable, saved_path
from specattn_codegen import models
from specattn_codegen.errors import SpecError
from specattn_codegen.heads import HeadConfig
from specattn_codegen.processors import cpu_info, gpus
from specattn_codegen.processors.arch import Arch
from specattn_codegen.spec import DTYPES, Dtype

PICTURES = (".png", ".svg", ".pdf")


@dataclass(frozen=True, slots=True, kw_only=True)
class Common:
    """The options that questions share, read. dtypes: empty where none was named; gpus: to be modelled instead."""

    heads: HeadConfig
    dtypes: tuple[Dtype, ...]
    page_size: int
    seconds: float
    threads: int | None
    plans: Plans
    json_path: Path | None
    plot_path: Path | None
    save: bool
    gpus: tuple[Arch, ...]

    def __post_init__(self) -> None:
        if self.gpus and (self.plot_path or self.save):
            raise SpecError("--plot and --save are for what was measured; with --gpu use --json")

    def here(self, question: str) -> Places:
        """This machine's CPU and where the answer goes; every place is tried before anything is timed."""
        if not 0 < self.seconds < float("inf"):
            raise SpecError(f"--seconds {self.seconds:g}: must be above 0")
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        arch = cpu_info.detect(measure=False)
        require_picture(self.plot_path)
        return Places(
            arch=arch, json=report_paths(question, arch, self.json_path, save=self.save), picture=self.plot_path
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """The machine that is measured, and the files its answer is written to."""

    arch: Arch
    json: list[Path]
    picture: Path | None


def shared(command: Callable[..., None]) -> Callable[..., None]:
    """Reads the options below for a command, which gets them as its first argument."""

    @functools.wraps(command)
    def with_common(
        *,
        heads: str,
        dtypes: tuple[Dtype, ...],
        page_size: int,
        seconds: float,
        threads: int | None,
        plan: tuple[str, ...],
        plan_source: PlanSource,
        json_path: Path | None,
        plot_path: Path | None,
        save: bool,
        gpus: tuple[str, ...],
        **own: object,
    ) -> None:
        common = Common(
            heads=heads_of(heads),
            dtypes=dtypes,
            page_size=page_size,
            seconds=seconds,
            threads=threads,
            plans=Plans(source=plan_source, overrides=parse_overrides(plan)),
            json_path=json_path,
            plot_path=plot_path,
            save=save,
            gpus=gpus_named(gpus),
        )
        command(common, **own)

    return functools.reduce(lambda bound, option: option(bound), reversed(OPTIONS), with_common)


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
    click.option("--gpu", "gpus", multiple=True, metavar="NAME|all", help="Model this GPU instead; may be repeated."),
)


def heads_of(text: str) -> HeadConfig:
    return HeadConfig(**models.parse_heads(text))


def gpus_named(names: Sequence[str]) -> tuple[Arch, ...]:
    """GPUs to model; `all` stands for every known one. Raises SpecError."""
    if "cpu" in names:
        raise SpecError("--gpu cpu: the CPU is here and is measured; leave --gpu out")
    wanted = gpus.names() if "all" in names else names
    return tuple(dict.fromkeys(gpus.find(name) for name in wanted))


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
