"""specattn-tune: from a model and a processor to a pack of tuned kernels."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import time
from collections import Counter
from pathlib import Path

import click
import torch
from rich.console import Console

from specattn_codegen import models, paths
from specattn_codegen.cli import console, tune_all_models, tune_bundle
from specattn_codegen.cli.options import SECONDS, SEED, TRIALS
from specattn_codegen.cli.progress import TuningProgress, closing_lines, closing_table, doubts
from specattn_codegen.cli.progress import console as output
from specattn_codegen.cli.rivals import find_rivals, rivals_table
from specattn_codegen.cli.tune_replay import replay
from specattn_codegen.cli.tune_request import TIMING, Request, announce_fit, find_budget, options, require_writable
from specattn_codegen.environment import device_name
from specattn_codegen.heads import HeadConfig
from specattn_codegen.packs import pack
from specattn_codegen.processors import gpus
from specattn_codegen.tuning.claims import own_device
from specattn_codegen.tuning.measure import Mode
from specattn_codegen.tuning.search import SAMPLERS, Sampler
from specattn_codegen.tuning.shared_study import storage_at, worker_name
from specattn_codegen.tuning.tune import Method, tune
from specattn_codegen.tuning.tune_session import Budget, Target

# Imported only where they are asked for: SciPy and matplotlib take as long to import as torch.
MODEL, REPORT = "specattn_codegen.cli.tune_model", "specattn_codegen.cli.tune_report"
EXAMPLES = """
\b
Examples:
  specattn-tune --model llama3-8b --gpu h100          modelled: no GPU needed, minutes on two cores
  specattn-tune --model llama3-8b --gpu cpu           measured on this machine
  specattn-tune --model qwen2.5-7b --gpu local --tp 2
  specattn-tune --model path/to/config.json --gpu a100 --op verify_attention --trials 60
  specattn-tune --heads 32,8,128 --gpu cpu --dtype bfloat16 --timeout 120 --out ./packs
  specattn-tune --heads 32,8,128 --gpu cpu --storage journal:studies.log --report tuning.html
  specattn-tune --heads 32,8,128 --gpu h100 --explain
  specattn-tune --model llama3-8b --gpu h100 --backend all
  specattn-tune all-models --gpu a100                 every registered model; goes on where it stopped

\b
Many processes may share the searches: start the same command, with one --storage, wherever it can be reached.
  journal:PATH                          for processes of one machine
  postgresql+psycopg://USER@HOST/NAME   or another database, for many machines
  grpc://HOST:PORT                      the proxy that Optuna starts with run_grpc_proxy_server
Each takes the kernels and sizes that nobody is at, then helps where others are; on a machine with several GPUs each
takes the next free one. They may join, leave and be killed at any time. To watch: optuna-dashboard PATH, or with the
database's URL; the parameters it shows are positions on the axes, and a trial's attribute `plan` says what they are.
"""


@click.group(
    "specattn-tune",
    epilog=EXAMPLES,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@options
@click.option("--trials", type=TRIALS, help="Plans tried per search. [8 where modelled, 12 where measured]")
@click.option("--timeout", type=SECONDS, metavar="SECONDS", help="Stop searching after this long and keep the best.")
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of the search and of the inputs.")
@click.option("--sampler", type=click.Choice(SAMPLERS), default="tpe", show_default=True, help="How plans are chosen.")
@TIMING
@click.option("--storage", metavar="URL", help="Share the searches, below.")
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR", help="Folder of packs. [the user's own]")
@click.option("--report", type=click.Path(path_type=Path), metavar="HTML", help="Write a page about the run.")
@click.option("--explain", is_flag=True, help="Print what the cost model says of the default and of its own choice.")
@click.option("--replay", "recorded", type=click.Path(path_type=Path), metavar="JSONL", help="Tune on recorded trials.")
@click.option("--calibrate", type=click.Path(path_type=Path), metavar="JSONL", help="Fit the cost model, to --fit.")
@click.option("--list-models", is_flag=True, help="Print every registered model and stop.")
@click.option("--list-gpus", is_flag=True, help="Print every known GPU and stop.")
@click.pass_context
def command(
    context: click.Context,
    trials: int | None,
    timeout: float | None,
    seed: int,
    sampler: Sampler,
    timing: Mode,
    storage: str | None,
    out: Path | None,
    report: Path | None,
    explain: bool,
    recorded: Path | None,
    calibrate: Path | None,
    list_models: bool,
    list_gpus: bool,
    **asked: object,
) -> None:
    """Tune the kernels of sparse self-speculative decoding for one model and one processor.

    A processor that is here is measured. One that is not is modelled: every candidate is compiled for it, its
    registers and shared memory are read from the binary, and a cost model ranks what fits. The pack says which.
    """
    if context.invoked_subcommand is not None:
        return
    if list_models or list_gpus:
        click.echo("\n".join(models.names() if list_models else (*gpus.names(), "cpu")))
        return
    if calibrate is not None:
        importlib.import_module(MODEL).calibrate(calibrate, asked["fit"], output())
        return
    if recorded is not None:
        replay(recorded, find_budget(trials, timeout, seed, is_present=True), sampler, output())
        return
    require_writable(paths.cache_dir(), "SPECATTN_CACHE_DIR")
    request = Request(**asked)  # pyright: ignore[reportArgumentType] - click has checked every one of them
    kinds = request.kinds()
    if explain:
        importlib.import_module(MODEL).explain(request, kinds, request.target(), output())
        return
    folder = require_writable(out or paths.user_packs_dir(), "--out")
    if report is not None:
        require_writable(report.parent, "--report")
    with contextlib.ExitStack() as held:
        shared = held.enter_context(storage_at(storage)) if storage else None
        count = 0 if shared is None or request.gpu == "cpu" else torch.cuda.device_count()
        if shared is not None and count:
            held.enter_context(own_device(shared, worker_name(), count))
        target = dataclasses.replace(request.target(), mode=timing)
        budget = find_budget(trials, timeout, seed, is_present=target.is_present)
        tune_all(request, kinds, target, budget, Method(sampler=sampler, storage=shared), folder, report)


def tune_all(
    request: Request,
    kinds: list[HeadConfig],
    target: Target,
    budget: Budget,
    method: Method,
    out: Path,
    page: Path | None,
) -> None:
    screen = output()
    for heads in kinds:
        pack.existing(out, target.arch, heads)  # a pack that must not be added to is found before tuning starts
    searches = [request.tasks(heads, target) for heads in kinds]
    how = "measured here" if target.is_present else "modelled, as it is not here"
    named = ", ".join(heads.name for heads in kinds)
    dtype = request.kv_dtype or request.dtype_on(target)
    screen.print(
        f"{named} on {target.arch.name} ({how}), {dtype}, at most {budget.trials} trials a search", markup=False
    )
    announce_fit(target.arch, screen)
    if "tilelang" in target.backends and not target.is_present:
        screen.print("TileLang is proved on a GPU only: what is found is recorded, and no pack takes it", markup=False)
    started = time.monotonic()
    progress = TuningProgress(screen, sum(map(len, searches)))
    try:
        with progress:
            for tasks in filter(None, searches):
                tune(tasks, target, budget, progress, out, method)
    finally:  # an interrupted run shows what it has saved
        show(screen, progress, target, [pack.pack_path(out, target.arch, heads) for heads in kinds])
        if page is not None:
            importlib.import_module(REPORT).write_report(page, target, progress)
            screen.print(f"report: {page}", markup=False, soft_wrap=True)
    screen.print(f"{len(progress.winners)} entries in {time.monotonic() - started:.0f} s", markup=False)


def show(screen: Console, progress: TuningProgress, target: Target, packs: list[Path]) -> None:
    if not progress.winners:
        return
    screen.print(closing_table(progress.winners))
    if len(target.backends) > 1:
        taken = Counter(entry.plan.backend for entry in progress.winners)
        screen.print("written in: " + ", ".join(f"{backend} ({count})" for backend, count in sorted(taken.items())))
    if rivals := find_rivals(progress.winners, [trial for _, trial in progress.trials]):
        screen.print(rivals_table(rivals))
    device = device_name(target.arch) if target.is_present else target.arch.name
    for line in closing_lines([path for path in packs if path.exists()], device, progress.winners):
        screen.print(line, markup=False, soft_wrap=True)
    for line in doubts([trial.outcome for _, trial in progress.trials]):
        screen.print(line, markup=False, soft_wrap=True)
    if progress.unfinished:
        screen.print(f"stopped early: {progress.unfinished} searches were not finished", markup=False)


for subcommand in (tune_all_models.all_models, tune_bundle.prepare, tune_bundle.measure, tune_bundle.merge):
    command.add_command(subcommand)


def main() -> None:
    console.run(command)
