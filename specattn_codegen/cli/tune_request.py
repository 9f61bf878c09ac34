"""What specattn-tune is asked for: the options that say which kernels and which processor, and what they mean."""

from __future__ import annotations

import dataclasses
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import click
import torch
from rich.console import Console

from specattn_codegen import models, space
from specattn_codegen.build import tilelang
from specattn_codegen.cli.options import HEADS, KV_DTYPE, MODEL, PAGE_SIZE, TP
from specattn_codegen.environment import fit_digest
from specattn_codegen.errors import SpecError
from specattn_codegen.heads import HeadConfig, layer_heads
from specattn_codegen.plan import BACKENDS, Backend
from specattn_codegen.processors import cpu_info, gpu_detect, gpus
from specattn_codegen.processors.arch import Arch
from specattn_codegen.spec import DTYPES, Dtype, KvDtype, Op
from specattn_codegen.tuning.measure import MODES
from specattn_codegen.tuning.model_fit import fitted
from specattn_codegen.tuning.tune import plan_tasks
from specattn_codegen.tuning.tune_session import Budget, Target, Task
from specattn_codegen.workloads import TUNED_OPS, default_workloads, model_specs

ALL_BACKENDS = "all"
DEFAULT_TRIALS = {"modelled": 8, "measured": 12}  # beyond 8 the model finds less than it errs by

Command = TypeVar("Command", bound=Callable[..., object])

OPTIONS = (
    MODEL,
    HEADS,
    click.option("--gpu", default="local", show_default=True, metavar="NAME|local|cpu", help="The processor."),
    click.option("--op", "ops", multiple=True, type=click.Choice(TUNED_OPS), help="Only this one; may be repeated."),
    click.option("--dtype", type=click.Choice(DTYPES), help="Of q and the KV cache. [bfloat16; float32 on the CPU]"),
    KV_DTYPE,
    PAGE_SIZE,
    TP,
    click.option(
        "--backend",
        type=click.Choice((*BACKENDS, ALL_BACKENDS)),
        help="Kernel language, or all that run there, each searched with as many trials. [cpu or triton]",
    ),
    click.option(
        "--fit",
        type=click.Path(path_type=Path),
        metavar="JSON",
        help="What --calibrate made of the cost model for this processor. [the user's own, if any]",
    ),
)
TIMING = click.option(
    "--timing",
    type=click.Choice(MODES),
    default="eager",
    show_default=True,
    help="Of a GPU that is here: kernels launched one by one, or replayed from a CUDA graph.",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """As typed; the options of OPTIONS under their own names."""

    model: str | None
    heads: str | None
    gpu: str
    ops: tuple[Op, ...]
    dtype: Dtype | None
    kv_dtype: KvDtype | None
    page_size: int
    tp: int
    backend: Backend | Literal["all"] | None
    fit: Path | None = None

    def target(self) -> Target:
        """Raises SpecError for an option that means nothing, PackError for a fit that is none of this processor, and
        BuildError where TileLang is asked for and it or its compiler is missing."""
        found = find_target(self.gpu, self.backend, self.page_size)
        if "tilelang" in found.backends:
            tilelang.require_compilers()
        return dataclasses.replace(found, arch=fitted(found.arch, self.fit))

    def kinds(self) -> list[HeadConfig]:
        return find_heads(self.model, self.heads, self.tp)

    def dtype_on(self, target: Target) -> Dtype:
        return self.dtype or ("bfloat16" if target.arch.is_gpu else "float32")

    def tasks(self, heads: HeadConfig, target: Target) -> list[Task]:
        specs = model_specs(
            heads,
            dtype=self.dtype_on(target),
            kv_dtype=self.kv_dtype,
            page_size=target.page_size if target.arch.is_gpu else 0,
            ops=self.ops or TUNED_OPS,
        )
        return plan_tasks([(spec, default_workloads(spec, target.arch)) for spec in specs], target)


def options(command: Command) -> Command:
    for option in reversed(OPTIONS):
        command = option(command)
    return command


def find_target(gpu: str, wanted: Backend | Literal["all"] | None, page_size: int) -> Target:
    arch, is_present = find_arch(gpu)
    served = space.backends_for(arch)
    if wanted == ALL_BACKENDS:
        return Target(arch=arch, backend=served[0], is_present=is_present, page_size=page_size, further=served[1:])
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


def announce_fit(arch: Arch, screen: Console) -> None:
    """Says so where the cost model is not as it is."""
    if arch.fit:
        factors = ", ".join(f"{limit} x {factor:.3g}" for limit, factor in arch.fit)
        screen.print(
            f"cost model: fitted to measurements on {arch.name} (fit {fit_digest(arch)}: {factors})", markup=False
        )


def find_heads(model: str | None, heads: str | None, tp: int) -> list[HeadConfig]:
    """One HeadConfig per kind of layer, equal ones once."""
    if (model is None) == (heads is None):
        raise SpecError("give exactly one of --model and --heads, as in --model llama3-8b or --heads 32,8,128")
    if heads is not None:
        return [HeadConfig(**models.parse_heads(heads)).shard(tp)]
    return list(dict.fromkeys(kind.shard(tp) for kind in layer_heads(model or "").values()))


def find_budget(trials: int | None, timeout: float | None, seed: int, *, is_present: bool) -> Budget:
    usual = DEFAULT_TRIALS["measured" if is_present else "modelled"]
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
