"""Where a number came from: versions, device and silicon. Facts only; nothing here decides anything."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib import metadata

import torch

from specattn_codegen.build import cpu
from specattn_codegen.digest import digest
from specattn_codegen.errors import BuildError
from specattn_codegen.plan import Backend
from specattn_codegen.processors.arch import Arch, Vendor


@dataclass(frozen=True, slots=True, kw_only=True)
class Silicon:
    """The facts that tell one processor from another for a kernel; a product's name is not one of them.

    The CPU's bandwidth is measured, so it is 0 here: what is measured cannot identify. Its model is what tells it from
    others of its instruction set, cores and caches; a GPU's compute capability does that.
    """

    name: str
    vendor: Vendor
    compute_capability: int
    target: str
    num_sms: int
    smem_per_block: int
    l2_bytes: int
    bandwidth_gbs: float
    cpu_model: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """compiler: what turned the source into a binary; device: the processor that ran it, None where none did; fit: of
    the cost model that ranked it, by its digest, empty for the model as it is and where nothing was modelled."""

    specattn_codegen: str
    python: str
    torch: str
    compiler: str
    platform: str
    device: str | None
    fit: str = ""


def silicon(arch: Arch) -> Silicon:
    return Silicon(
        name=arch.name,
        vendor=arch.vendor,
        compute_capability=arch.compute_capability,
        target=arch.target,
        num_sms=arch.num_sms,
        smem_per_block=arch.smem_per_block,
        l2_bytes=arch.l2_bytes,
        bandwidth_gbs=float(arch.bandwidth_gbs) if arch.is_gpu else 0.0,
        cpu_model=arch.cpu_model,
    )


def device_name(arch: Arch) -> str:
    """What is here by name: the GPU's by its driver, the CPU's as its Arch found it, with the threads torch uses."""
    if arch.is_gpu:
        return torch.cuda.get_device_name()
    return f"{arch.source.removeprefix('this machine: ')}, {torch.get_num_threads()} threads"


def compiler_version(backend: Backend) -> str:
    """What turns a source into a binary, by name and version, with whatever options are not in the source itself.
    Raises BuildError where the backend has no compiler on this machine."""
    if backend == "cpu":
        return f"{cpu.compiler_version()}, options {digest(cpu.FLAGS, cpu.TARGET_FLAGS)[:8]}"
    try:
        return f"{backend} {metadata.version(backend)}"
    except metadata.PackageNotFoundError as error:
        raise BuildError(f"{backend} is not installed; `pip install {backend}`, or use another --backend") from error


def own_version() -> str:
    try:
        return metadata.version("specattn-codegen")
    except metadata.PackageNotFoundError:
        return "source tree"


def fit_digest(arch: Arch) -> str:
    """Of what the cost model was fitted to be for a processor; empty for the model as it is."""
    return digest(arch.fit) if arch.fit else ""


def current(backend: Backend, device: str | None, fit: str = "") -> Environment:
    return Environment(
        specattn_codegen=own_version(),
        python=platform.python_version(),
        torch=metadata.version("torch"),
        compiler=compiler_version(backend),
        platform=f"{platform.system()} {platform.machine()}",
        device=device,
        fit=fit,
    )
