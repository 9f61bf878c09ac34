"""specattn-tune prepare, measure and merge: from a machine without the processor to one with it, and back."""

from __future__ import annotations

from pathlib import Path

import click

from specattn_codegen import paths
from specattn_codegen.cli.options import SECONDS, SEED
from specattn_codegen.cli.progress import TuningProgress, closing_table, doubts
from specattn_codegen.cli.progress import console as output
from specattn_codegen.cli.tune_request import TIMING, Request, announce_fit, find_budget, options, require_writable
from specattn_codegen.tuning import bundle
from specattn_codegen.tuning.measure import Mode
from specattn_codegen.tuning.workforce import processes

FOLDER = click.argument("folder", type=click.Path(path_type=Path))


@click.command("prepare")
@FOLDER
@options
@click.option("--plans", default=8, show_default=True, type=click.IntRange(min=1), help="Timed per kernel and size.")
@click.option("--seed", default=0, show_default=True, type=SEED, help="Of the inputs.")
def prepare(folder: Path, plans: int, seed: int, **asked: object) -> None:
    """Write a bundle: the plans the cost model likes best and their sources, to be timed where the processor is."""
    request = Request(**asked)  # pyright: ignore[reportArgumentType] - click has checked every one of them
    target = request.target()
    require_writable(folder, "FOLDER")
    announce_fit(target.arch, output())
    tasks = [task for heads in request.kinds() for task in request.tasks(heads, target)]
    made = bundle.prepare(folder, tasks, target, count=plans, seed=seed)
    count = sum(len(one.plans) for one in made.wanted)
    click.echo(f"{folder}: {count} plans of {len(made.wanted)} kernels and sizes for {target.arch.name}")
    click.echo(f"next, where that is: specattn-tune measure {folder}")


@click.command("measure")
@FOLDER
@TIMING
@click.option(
    "--timeout", type=SECONDS, metavar="SECONDS", help="Stop after this long; another run goes on from there."
)
def measure(folder: Path, timing: Mode, timeout: float | None) -> None:
    """Build, prove and time a bundle's plans on the processor of this machine. May be stopped and run again."""
    require_writable(paths.cache_dir(), "SPECATTN_CACHE_DIR")
    screen, found = output(), bundle.read(folder)
    trials = max(len(one.plans) for one in found.wanted)
    budget = find_budget(trials, timeout, found.seed, is_present=True)
    progress = TuningProgress(screen, len(found.wanted))
    try:
        with progress:
            bundle.measure(folder, progress, budget, processes, timing)
    finally:  # an interrupted measurement shows what it has saved
        if progress.winners:
            screen.print(closing_table(progress.winners))
        for line in doubts([trial.outcome for _, trial in progress.trials]):
            click.echo(line)
        if progress.trials and progress.unfinished:
            click.echo(
                f"stopped early: {progress.unfinished} of {len(found.wanted)} were not finished; the same "
                "command goes on from there"
            )
    click.echo(f"next, back home: specattn-tune merge {folder}")


@click.command("merge")
@FOLDER
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR", help="Folder of packs. [the user's own]")
def merge(folder: Path, out: Path | None) -> None:
    """Take a measured bundle home: trials into the records, winners into the packs, in place of modelled ones."""
    new, packs = bundle.merge(folder, require_writable(out or paths.user_packs_dir(), "--out"))
    click.echo(f"{new} new trials recorded")
    for path in packs:
        click.echo(f"pack: {path}")
