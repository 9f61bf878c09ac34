"""specattn-tune: from a model and a processor to a pack of tuned kernels."""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path

import click
import torch
from rich.console import Console

from specattn_codegen import cpu_info, gpu_detect, gpus, models, pack, paths, space
from specattn_codegen.arch import Arch
from specattn_codegen.cli import console
from specattn_codegen.cli.progress import TuningProgress, closing_lines, closing_table
from specattn_codegen.cli.progress import console as output
from specattn_codegen.environment import device_name
from specattn_codegen.errors import SpecError
from specattn_codegen.heads import HeadConfig, layer_heads
from specattn_codegen.plan import BACKENDS, Backend
from specattn_codegen.spec import DTYPES, FLOAT8, Dtype, KvDtype, Op
from specattn_codegen.tune import plan_tasks, tune
from specattn_codegen.tune_session import Budget, Target, Task
from specattn_codegen.workloads import TUNED_OPS, default_workloads, model_specs

DEFAULT_PAGE_SIZE = 16
DEFAULT_TRIALS = {"modelled": 16, "measured": 12}
EXAMPLES = """
\b
Examples:
  specattn-tune --model llama3-8b --gpu h100          modelled: no GPU needed, minutes on two cores
  specattn-tune --model llama3-8b --gpu cpu           measured on this machine
  specattn-tune --model qwen2.5-7b --gpu local --tp 2
  specattn-tune --model path/to/config.json --gpu a100 --op verify_attention --trials 60
  specattn-tune --heads 32,8,128 --gpu cpu --dtype bfloat16 --timeout 120 --out ./packs
"""


@click.command(epilog=EXAMPLES, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--model", metavar="NAME|PATH", help="A registered model, a Hugging Face config.json, or its folder.")
@click.option("--heads", metavar="HQ,HKV,D", help="Query heads, KV heads and head dim instead of a model.")
@click.option("--gpu", default="local", show_default=True, metavar="NAME|local|cpu", help="The processor to tune for.")
@click.option("--op", "ops", multiple=True, type=click.Choice(TUNED_OPS), help="Only this operation; may be repeated.")
@click.option("--dtype", type=click.Choice(DTYPES), help="Of q and the KV cache. [bfloat16; float32 on the CPU]")
@click.option("--kv-dtype", type=click.Choice(FLOAT8), help="Of an 8-bit KV cache, which comes with scales.")
@click.option("--page-size", type=int, default=DEFAULT_PAGE_SIZE, show_default=True, help="Keys per page of the cache.")
@click.option("--tp", type=int, default=1, show_default=True, help="Tensor-parallel ranks the heads are split over.")
@click.option("--trials", type=int, help="Plans tried per search. [16 where modelled, 12 where measured]")
@click.option("--timeout", type=float, metavar="SECONDS", help="Stop searching after this long and keep the best.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the search and of the inputs.")
@click.option("--backend", type=click.Choice(BACKENDS), help="Kernel language. [cpu or triton]")
@click.option("--out", type=click.Path(path_type=Path), metavar="DIR", help="Folder of packs. [the user's own]")
@click.option("--list-models", is_flag=True, help="Print every registered model and stop.")
@click.option("--list-gpus", is_flag=True, help="Print every known GPU and stop.")
def command(
    model: str | None,
    heads: str | None,
    gpu: str,
    ops: tuple[Op, ...],
    dtype: Dtype | None,
    kv_dtype: KvDtype | None,
    page_size: int,
    tp: int,
    trials: int | None,
    timeout: float | None,
    seed: int,
    backend: Backend | None,
    out: Path | None,
    list_models: bool,
    list_gpus: bool,
) -> None:
    """Tune the kernels of sparse self-speculative decoding for one model and one processor.

    A processor that is here is measured. One that is not is modelled: every candidate is compiled for it, its
    registers and shared memory are read from the binary, and a cost model ranks what fits. The pack says which.
    """
    if list_models or list_gpus:
        click.echo("\n".join(models.names() if list_models else (*gpus.names(), "cpu")))
        return
    require_writable(paths.cache_dir(), "SPECATTN_CACHE_DIR")
    target = find_target(gpu, backend, page_size)
    kinds = find_heads(model, heads, tp)
    folder = require_writable(out or paths.user_packs_dir(), "--out")
    budget = find_budget(trials, timeout, seed, target)
    chosen: Dtype = dtype or ("bfloat16" if target.arch.is_gpu else "float32")
    tune_all(kinds, target, chosen, kv_dtype, ops or TUNED_OPS, budget, folder)


def find_target(gpu: str, wanted: Backend | None, page_size: int) -> Target:
    if page_size < 1:
        raise SpecError(f"--page-size {page_size}: must be at least 1 key; {DEFAULT_PAGE_SIZE} is usual")
    arch, is_present = find_arch(gpu)
    served = space.backends_for(arch)
    if wanted is not None and wanted not in served:
        raise SpecError(f"--backend {wanted}: does not run on {arch.name}; use {', '.join(served)}, or leave it out")
    return Target(arch=arch, backend=wanted or served[0], is_present=is_present, page_size=page_size)


def find_arch(gpu: str) -> tuple[Arch, bool]:
    """The processor, and whether it is the one at hand."""
    if gpu == "cpu":
        return cpu_info.detect(refresh=True), True
    if gpu == "local":
        return gpu_detect.local(), True
    arch = gpus.find(gpu)
    return arch, torch.cuda.is_available() and gpu_detect.local() == arch


def find_heads(model: str | None, heads: str | None, tp: int) -> list[HeadConfig]:
    """One HeadConfig per kind of layer, equal ones once."""
    if (model is None) == (heads is None):
        raise SpecError("give exactly one of --model and --heads, as in --model llama3-8b or --heads 32,8,128")
    if heads is not None:
        return [HeadConfig(**models.parse_heads(heads)).shard(tp)]
    return list(dict.fromkeys(kind.shard(tp) for kind in layer_heads(model or "").values()))


def find_budget(trials: int | None, timeout: float | None, seed: int, target: Target) -> Budget:
    if trials is not None and trials < 1:
        raise SpecError(f"--trials {trials}: must be at least 1; the default plan is the first trial")
    if timeout is not None and not timeout > 0:
        raise SpecError(f"--timeout {timeout:g}: must be above 0 seconds")
    if not 0 <= seed < 2**32:
        raise SpecError(f"--seed {seed}: must be from 0 to {2**32 - 1}")
    usual = DEFAULT_TRIALS["measured" if target.is_present else "modelled"]
    ends_at = None if timeout is None else time.monotonic() + timeout
    return Budget(trials=trials or usual, seed=seed, ends_at=ends_at)


def require_writable(folder: Path, name: str) -> Path:
    """Finds out before an hour of tuning, not after it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            os.write(probe.fileno(), b"0")
    except OSError as error:
        raise SpecError(f"{name} {folder}: cannot be written ({error.strerror}); choose another folder") from error
    return folder


def tune_all(
    kinds: list[HeadConfig],
    target: Target,
    dtype: Dtype,
    kv_dtype: KvDtype | None,
    ops: tuple[Op, ...],
    budget: Budget,
    out: Path,
) -> None:
    screen = output()
    spec_page_size = target.page_size if target.arch.is_gpu else 0
    searches: list[list[Task]] = []
    for heads in kinds:
        pack.existing(out, target.arch, heads)  # a pack that must not be added to is found before tuning starts
        specs = model_specs(heads, dtype=dtype, kv_dtype=kv_dtype, page_size=spec_page_size, ops=ops)
        searches.append(plan_tasks([(spec, default_workloads(spec, target.arch)) for spec in specs], target))
    how = "measured here" if target.is_present else "modelled, as it is not here"
    named = ", ".join(heads.name for heads in kinds)
    screen.print(
        f"{named} on {target.arch.name} ({how}), {kv_dtype or dtype}, at most {budget.trials} trials a search",
        markup=False,
    )
    if target.backend == "tilelang" and not target.is_present:
        screen.print("TileLang is proved on a GPU only: what is found is recorded, and no pack takes it", markup=False)
    started = time.monotonic()
    progress = TuningProgress(screen, sum(map(len, searches)))
    try:
        with progress:
            for tasks in filter(None, searches):
                tune(tasks, target, budget, progress, out)
    finally:  # an interrupted run shows what it has saved
        report(screen, progress, target, [pack.pack_path(out, target.arch, heads) for heads in kinds])
    screen.print(f"{len(progress.winners)} entries in {time.monotonic() - started:.0f} s", markup=False)


def report(screen: Console, progress: TuningProgress, target: Target, packs: list[Path]) -> None:
    if not progress.winners:
        return
    screen.print(closing_table(progress.winners))
    device = device_name(target.arch) if target.is_present else target.arch.name
    for line in closing_lines([path for path in packs if path.exists()], device, progress.winners):
        screen.print(line, markup=False, soft_wrap=True)
    if progress.unfinished:
        screen.print(f"stopped early: {progress.unfinished} searches were not finished", markup=False)


def main() -> None:
    console.run(command)
