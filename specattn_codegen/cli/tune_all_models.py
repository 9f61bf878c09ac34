"""specattn-tune all-models: packs for all heads of the registry by one command, which goes on where it stopped."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click

from specattn_codegen import models, paths
from specattn_codegen.cli.options import DEFAULT_PAGE_SIZE, SECONDS, SEED, TRIALS
from specattn_codegen.cli.progress import TuningProgress
from specattn_codegen.cli.progress import console as output
from specattn_codegen.cli.tune_request import Request, announce_fit, find_budget, require_writable
from specattn_codegen.heads import HeadConfig, layer_heads
from specattn_codegen.packs import pack
from specattn_codegen.packs.staleness import grade
from specattn_codegen.tuning.tune import Method, tune
from specattn_codegen.tuning.tune_session import Target, Task
from specattn_codegen.tuning.workforce import lasting

# Where measured: the default and the cost model's own four. In three sweeps of all plans on an AMD EPYC of 2026-11 the
# best of them was within 1 % of the best there is.
MEASURED_TRIALS = 5
SHIPPED_GPUS = ("h100", "h200", "a100", "l40s", "rtx4090", "b200", "mi300x")


@dataclass(frozen=True, slots=True, kw_only=True)
class Gap:
    """What a pack still lacks: searches without a winner of today's templates, space and compiler for every size."""

    target: Target
    heads: HeadConfig
    tasks: tuple[Task, ...]

    @property
    def name(self) -> str:
        return f"{self.target.arch.name}/{self.heads.name}"


def heads_by_use(names: Sequence[str]) -> list[HeadConfig]:
    """Heads of the models' layers, those that most of the models share first."""
    uses = Counter(heads for name in names for heads in dict.fromkeys(layer_heads(name).values()))
    return [heads for heads, _ in uses.most_common()]


def usual_request(gpu: str) -> Request:
    """What `specattn-tune` is asked for by `--gpu` alone."""
    return Request(
        model=None,
        heads=None,
        gpu=gpu,
        ops=(),
        dtype=None,
        kv_dtype=None,
        page_size=DEFAULT_PAGE_SIZE,
        tp=1,
        backend=None,
    )


def gap(heads: HeadConfig, asked: Request, target: Target, out: Path) -> Gap:
    """Raises PackError for a pack that must not be added to."""
    entries = pack.existing(out, target.arch, heads).entries
    fresh = {
        pack.slot(entry.spec, entry.workload)
        for entry in entries
        if grade(entry, target.arch) in ("exact", "compatible")
    }
    lacking = (
        task
        for task in asked.tasks(heads, target)
        if any(pack.slot(task.spec, workload) not in fresh for workload in task.workloads)
    )
    return Gap(target=target, heads=heads, tasks=tuple(lacking))


@click.command("all-models")
@click.option(
    "--gpu",
    "gpus",
    multiple=True,
    metavar="NAME",
    default=SHIPPED_GPUS,
    show_default=True,
    help="Only for this one, or for cpu; may be repeated.",
)
@click.option("--model", "chosen", multiple=True, metavar="NAME", help="Only this one; may be repeated.")
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR", help="Folder of packs. [the user's own]")
@click.option("--jobs", type=click.IntRange(min=1), help="Processes that compile, or prove, at a time. [one a core]")
@click.option("--trials", type=TRIALS, help="Plans tried per search at most. [8 where modelled, 5 where measured]")
@click.option(
    "--timeout", type=SECONDS, metavar="SECONDS", help="Stop after this long; another run goes on from there."
)
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of the searches and of the inputs.")
@click.option("--dry-run", is_flag=True, help="Print which packs lack something, and stop.")
def all_models(
    gpus: tuple[str, ...],
    chosen: tuple[str, ...],
    out: Path | None,
    jobs: int | None,
    trials: int | None,
    timeout: float | None,
    seed: int,
    dry_run: bool,
) -> None:
    """Tune what registered models need, once for heads that several share, as `specattn-tune` does for one of them.

    Heads that most models share come first. What a pack has already is kept while templates, space and compiler are
    as they were: the command may be stopped at any time and run again. The shipped packs are made by
    `specattn-tune all-models --out tuned_configs`.
    """
    folder = require_writable(out or paths.user_packs_dir(), "--out")
    screen = output()
    targets = [(asked, asked.target()) for asked in map(usual_request, gpus)]
    for _, target in targets:
        announce_fit(target.arch, screen)
    wanted = [
        gap(heads, asked, target, folder)
        for heads in heads_by_use(chosen or models.names())
        for asked, target in targets
    ]
    gaps = [one for one in wanted if one.tasks]
    screen.print(f"{len(wanted) - len(gaps)} of {len(wanted)} packs are complete", markup=False)
    if dry_run:
        for one in gaps:
            screen.print(f"{one.name}: {len(one.tasks)} searches to do", markup=False)
        return
    progress = TuningProgress(screen, sum(len(one.tasks) for one in gaps))
    with lasting(jobs) as workforce, progress:
        until = find_budget(trials, timeout, seed, is_present=False)
        for one in gaps:
            if until.is_spent:
                break
            count = trials or (MEASURED_TRIALS if one.target.is_present else None)
            usual = find_budget(count, None, seed, is_present=one.target.is_present)
            budget = dataclasses.replace(usual, ends_at=until.ends_at)
            screen.print(one.name, markup=False)
            tune(one.tasks, one.target, budget, progress, folder, Method(workforce=workforce))
    screen.print(f"{len(progress.winners)} entries in {folder}", markup=False, soft_wrap=True)
    if progress.unfinished:
        screen.print(f"{progress.unfinished} searches are left to do; the same command goes on with them", markup=False)
