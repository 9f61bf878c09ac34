"""Compiles rendered TileLang through nvcc for an NVIDIA GPU that need not be here, and reads what its binary takes."""

from __future__ import annotations

import functools
import subprocess
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import msgspec
from tilelang import env

from specattn_codegen import paths
from specattn_codegen.build.cubin import MANIFEST, TensorMap
from specattn_codegen.build.disassemble import cubin_usage, cuobjdump_path
from specattn_codegen.build.resources import Resources
from specattn_codegen.build.store import publish
from specattn_codegen.build.tilelang_lower import Lowered, lower_for_cuda
from specattn_codegen.digest import digest
from specattn_codegen.errors import BuildError
from specattn_codegen.processors.arch import Arch
from specattn_codegen.render import Source

# Without fusing multiplications into additions, results do not change with what else a function computes.
FLAGS = ("-cubin", "-O3", "-std=c++20", "--fmad=false", "-w")
COMPILE_SECONDS = 300
VECTOR = 8  # what caches of any framework are aligned to; other ones are read element by element
MANIFEST_VERSION = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Binary:
    """One device function of a compiled folder: <name>.cu is its text and <name>.cubin its machine code.

    To launch it, take `symbol` from the cubin, ask for `smem_bytes` of dynamic shared memory, and give the arguments
    in the order of `parameters`, (type, name) each; grids are those of the rendered file's `launch`. A parameter of
    `tensor_maps` is what cuTensorMapEncodeTiled makes of an array.
    """

    name: str
    symbol: str
    parameters: tuple[tuple[str, str], ...]
    threads: int
    smem_bytes: int
    tensor_maps: dict[str, TensorMap]
    resources: Resources


@functools.cache
def nvcc() -> str:
    """NVIDIA's compiler where TileLang finds it: in CUDA_HOME, on the PATH, or in the wheel nvidia-cuda-nvcc."""
    found = Path(env.CUDA_HOME) / "bin" / "nvcc"
    if not env.CUDA_HOME or not found.is_file():
        raise BuildError(
            "TileLang compiles with NVIDIA's nvcc, and there is none; install CUDA 12.4 or newer and put nvcc on the "
            "PATH, or `pip install 'nvidia-cuda-nvcc>=13'`, or use --backend triton"
        )
    return str(found)


@functools.cache
def versions() -> str:
    """TileLang's and nvcc's, as in `tilelang 0.1.15, nvcc 13.0.88`."""
    shown = subprocess.run([nvcc(), "--version"], capture_output=True, text=True, check=False).stdout
    release = shown.rpartition(" V")[2].partition("\n")[0]
    return f"tilelang {metadata.version('tilelang')}, nvcc {release}"


def compiled_folder(source: Source, arch: Arch, vector: int = VECTOR) -> Path:
    """Where the text and the machine code of every device function lie, compiled unless the cache has them.

    Keyed by everything that changes them: the rendered file, the target, the vector width and both compilers. Raises
    BuildError in the compiler's words.
    """

    def write(folder: Path) -> None:
        lowered_functions = lower_for_cuda(source, arch, vector)
        _require_descriptors(source, lowered_functions)
        binaries = tuple(_compile(lowered, arch, folder) for lowered in lowered_functions)
        (folder / MANIFEST).write_bytes(msgspec.json.encode(binaries))

    key = digest(source.digest, arch.target, vector, versions(), FLAGS, MANIFEST_VERSION)
    return publish(paths.cache_dir() / "kernels" / "tilelang-cubin" / key, write)


def _require_descriptors(source: Source, functions: tuple[Lowered, ...]) -> None:
    """Where TileLang finds a copy unfit for the tensor memory accelerator it quietly reads through pointers, for which
    the template gives no strides."""
    if source.plan.as_dict().get("kv_load") != "descriptor":
        return
    described = {one.array for lowered in functions for one in lowered.tensor_maps.values()}
    missing = {"k_cache", "v_cache"} - described
    if missing:
        raise BuildError(
            f"{source.spec.name}: TileLang reads {' and '.join(sorted(missing))} through pointers here; "
            "use kv_load=pointer"
        )


def read_manifest(folder: Path) -> tuple[Binary, ...]:
    return msgspec.json.decode((folder / MANIFEST).read_bytes(), type=tuple[Binary, ...])


def cross_compile(source: Source, arch: Arch) -> tuple[Resources, ...]:
    """Resources of every device function of `source` on `arch`, in the order they are launched. Raises BuildError."""
    return tuple(binary.resources for binary in read_manifest(compiled_folder(source, arch)))


def binary_of(source: Source, arch: Arch, name: str) -> bytes:
    """Machine code of one device function, by its name in the template. Raises BuildError."""
    return (compiled_folder(source, arch) / f"{name}.cubin").read_bytes()


def _compile(lowered: Lowered, arch: Arch, folder: Path) -> Binary:
    text, cubin = folder / f"{lowered.name}.cu", folder / f"{lowered.name}.cubin"
    text.write_text(lowered.text)
    includes = (f"-I{env.TILELANG_TEMPLATE_PATH}", f"-I{env.CUTLASS_INCLUDE_DIR}")
    command = [nvcc(), *FLAGS, f"-arch={arch.target}", *includes, str(text), "-o", str(cubin)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=COMPILE_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"nvcc took over {COMPILE_SECONDS} s on {lowered.name} for {arch.name}") from error
    if done.returncode:
        reason = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[-300:])
        raise BuildError(f"{lowered.name} does not compile for {arch.name}: {reason}")
    usage = cubin_usage(cubin, lowered.symbol, cuobjdump_path())
    resources = Resources(
        kernel=lowered.name,
        registers=usage.registers,
        spill_bytes=usage.spill_bytes,
        # Shared memory is asked for at launch, on top of what the binary reserves.
        smem_bytes=usage.smem_bytes + lowered.smem_bytes,
        num_warps=lowered.threads // arch.warp_size,
        binary_bytes=cubin.stat().st_size,
    )
    return Binary(
        name=lowered.name,
        symbol=lowered.symbol,
        parameters=lowered.parameters,
        threads=lowered.threads,
        smem_bytes=lowered.smem_bytes,
        tensor_maps=dict(lowered.tensor_maps),
        resources=resources,
    )
