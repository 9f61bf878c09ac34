"""Compiles rendered Triton for a GPU that need not be here, and reads what each kernel takes from its binary."""

from __future__ import annotations

import tempfile
from pathlib import Path

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.compiler.errors import CompilationError
from triton.errors import TritonError
from triton.runtime.jit import JITFunction

from specattn_codegen import paths
from specattn_codegen.build.disassemble import amdgcn_usage, cubin_usage
from specattn_codegen.build.module import import_source
from specattn_codegen.build.program import function_program
from specattn_codegen.build.resources import Resources
from specattn_codegen.build.store import remembered
from specattn_codegen.build.triton import is_interpreted
from specattn_codegen.digest import digest
from specattn_codegen.errors import BuildError
from specattn_codegen.processors.arch import Arch
from specattn_codegen.render import Source


def cross_compile(source: Source, arch: Arch) -> tuple[Resources, ...]:
    """Resources of every device function of `source` on `arch`, in the order they are launched.

    Needs no GPU. Results are kept by source, target and Triton version, and those of a function by what of the source
    it is made of: a selection is the same for all heads, and plans share what their settings do not touch. Raises
    BuildError with the compiler's last line where a function does not compile.
    """
    kept = paths.cache_dir() / "resources" / "triton" / digest(source.digest, arch.target, triton.__version__)
    return remembered(kept, tuple[Resources, ...], lambda: _compile_all(source, arch))


def _compile_all(source: Source, arch: Arch) -> tuple[Resources, ...]:
    if is_interpreted():
        raise BuildError("TRITON_INTERPRET=1 replaces Triton's compiler; unset it in the process that cross-compiles")
    kernels: dict[JITFunction, dict[str, int]] = import_source(source).KERNELS
    with tempfile.TemporaryDirectory() as scratch, knobs.cache.scope():
        knobs.cache.dir = scratch  # what is worth keeping is kept above
        return tuple(_compile_one(source, kernel, options, arch, Path(scratch)) for kernel, options in kernels.items())


def _compile_one(source: Source, kernel: JITFunction, options: dict[str, int], arch: Arch, scratch: Path) -> Resources:
    program = function_program(source.text, kernel.__name__)
    key = digest(program, kernel.__name__, options, arch.target, triton.__version__)
    kept = paths.cache_dir() / "resources" / "triton-functions" / key
    return remembered(kept, Resources, lambda: _resources(_compile(kernel, options, arch), arch, scratch))


def binary_of(source: Source, arch: Arch, name: str) -> bytes:
    """Machine code of one device function, by its name in the template. Raises BuildError."""
    kernels: dict[JITFunction, dict[str, int]] = import_source(source).KERNELS
    with tempfile.TemporaryDirectory() as scratch, knobs.cache.scope():
        knobs.cache.dir = scratch
        (binary,) = (
            _compile(kernel, options, arch).asm["cubin" if arch.vendor == "nvidia" else "hsaco"]
            for kernel, options in kernels.items()
            if kernel.__name__ == name
        )
    return binary


def target_of(arch: Arch) -> GPUTarget:
    if arch.vendor == "nvidia":
        return GPUTarget("cuda", arch.compute_capability, arch.warp_size)
    return GPUTarget("hip", arch.target, arch.warp_size)


def _compile(kernel: JITFunction, options: dict[str, int], arch: Arch) -> CompiledKernel:
    """The variant that launches take: annotated types, 16-byte alignment wherever Triton would look for it, and the
    constants that are their own default."""
    # Triton calls no type of its own what an annotation says of a tensor descriptor, and takes it nevertheless.
    signature = {parameter.name: parameter.annotation_type or parameter.annotation for parameter in kernel.params}
    aligned = {
        (parameter.num,): [["tt.divisibility", 16]]
        for parameter in kernel.params
        if parameter.annotation_type and not (parameter.is_constexpr or parameter.do_not_specialize)
    }
    constants = {(parameter.num,): parameter.default for parameter in kernel.params if parameter.is_constexpr}
    try:
        return triton.compile(
            ASTSource(kernel, signature, constants, aligned), target=target_of(arch), options=dict(options)
        )
    except (CompilationError, TritonError, RuntimeError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise BuildError(
            f"{kernel.__name__} does not compile for {arch.name}: {lines[-1] if lines else error!r}"
        ) from error


def _resources(compiled: CompiledKernel, arch: Arch, scratch: Path) -> Resources:
    if arch.vendor == "nvidia":
        binary: bytes = compiled.asm["cubin"]
        cubin = scratch / f"{compiled.name}.cubin"
        cubin.write_bytes(binary)
        usage = cubin_usage(cubin, compiled.name, knobs.nvidia.cuobjdump.path)
    else:
        binary = compiled.asm["hsaco"]
        usage = amdgcn_usage(compiled.asm["amdgcn"])
    return Resources(
        kernel=compiled.name,
        registers=usage.registers,
        spill_bytes=usage.spill_bytes,
        # Triton asks for its shared memory at launch, on top of what the binary reserves.
        smem_bytes=max(usage.smem_bytes, compiled.metadata.shared),
        num_warps=compiled.metadata.num_warps,
        binary_bytes=len(binary),
    )
