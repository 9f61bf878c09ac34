"""The CPU backend: C++ through the system's compiler, called over a plain C interface with the caller's memory."""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

from specattn_codegen import paths
from specattn_codegen.build.store import publish
from specattn_codegen.digest import digest
from specattn_codegen.errors import BuildError, SpecError
from specattn_codegen.kernel import AttentionCall, Call, SelectCall
from specattn_codegen.plan import Plan
from specattn_codegen.policy import policy_numbers
from specattn_codegen.render import Source
from specattn_codegen.spec import KernelSpec

# -ffast-math is never used: in a shared object it flushes denormals for the whole process. Nor may the compiler fuse
# additions with multiplications as it sees fit: results would change with what else a kernel computes.
FLAGS = (
    "-std=c++17",
    "-O3",
    "-shared",
    "-fPIC",
    "-fopenmp",
    "-fno-math-errno",
    "-ffp-contract=off",
    "-Wall",
    "-Wno-psabi",
)
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c")
TARGET_FLAGS = {
    "amx-bf16": ("-mamx-tile", "-mamx-bf16", "-mavx512bf16", *_AVX512),
    "avx512-bf16": ("-mavx512bf16", *_AVX512),
    "avx512": _AVX512,
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "generic": (),
}
COMPILE_SECONDS = 120
LIBRARY = "kernel.so"
NO_SPACE = os.strerror(errno.ENOSPC)


@functools.cache
def compiler() -> str:
    """The C++ compiler: $CXX, else the first of c++, g++ and clang++ on the PATH."""
    wanted = (os.environ["CXX"],) if os.environ.get("CXX") else ("c++", "g++", "clang++")
    for name in wanted:
        found = shutil.which(name)
        if found:
            return found
    raise BuildError(
        f"no C++ compiler: looked for {', '.join(wanted)} on the PATH; "
        "install one (for example `apt-get install g++`) or set CXX to its path"
    )


@functools.cache
def compiler_version() -> str:
    shown = subprocess.run([compiler(), "--version"], capture_output=True, text=True, check=False)
    return shown.stdout.partition("\n")[0].strip()


def library_folder(text: str, target: str) -> Path:
    """Keyed by everything that changes the binary: the text, the compiler and its options."""
    return paths.cache_dir() / "kernels" / "cpu" / digest(text, compiler_version(), FLAGS, TARGET_FLAGS[target])


def compile_library(text: str, target: str, name: str) -> Path:
    """The shared object of a C++ text, compiled unless the cache has it. Raises BuildError in the compiler's words."""

    def write(folder: Path) -> None:
        file = folder / "kernel.cpp"
        file.write_text(text)
        command = [compiler(), *FLAGS, *TARGET_FLAGS[target], str(file), "-o", str(folder / LIBRARY)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=COMPILE_SECONDS)
        except subprocess.TimeoutExpired as error:
            raise BuildError(f"{compiler()} took over {COMPILE_SECONDS} s on {name}") from error
        if done.returncode:
            if NO_SPACE in done.stderr:
                raise OSError(errno.ENOSPC, NO_SPACE, str(folder))
            reason = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[-300:])
            raise BuildError(f"{compiler()} failed on {name}: {reason}")

    return publish(library_folder(text, target), write) / LIBRARY


def load_library(text: str, target: str, name: str) -> ctypes.CDLL:
    """Builds at need and loads. The object's OpenMP symbols bind to the runtime torch has already loaded."""
    try:
        return ctypes.CDLL(str(compile_library(text, target, name)))
    except OSError as error:
        folder = library_folder(text, target)
        raise BuildError(f"{folder} does not load ({error}); delete that folder to rebuild it") from error


STRAY_PAGE = 2  # what `run` of an attention kernel returns where a key's page is not in the cache


class _AttentionArguments(ctypes.Structure):
    """Mirrors `struct Arguments` of templates/cpu/_attention.jinja, field for field."""

    _POINTERS = (
        *("q", "k", "v", "out", "lse", "scores", "histogram", "sinks", "lse_ref", "k_scale", "v_scale"),
        *("page_table", "kv_lens", "cu_q", "indices", "counts", "slots", "tail_start", "mode", "workspace"),
    )
    _STRIDES = (
        *("q_row", "q_head", "k_page", "k_slot", "k_head", "v_page", "v_slot", "v_head", "out_row", "out_head"),
        *("table_row", "score_request", "score_row", "index_request", "index_row"),
        *("k_scale_head", "v_scale_head"),
    )
    _SIZES = (
        *("batch", "num_pages", "page_size", "max_q", "max_kv", "selected_width", "block", "slot_bytes"),
        *("split_keys", "threads", "stray_page"),
    )
    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in _STRIDES),
        *((name, ctypes.c_int32) for name in _SIZES),
    )


class _SelectArguments(ctypes.Structure):
    """Mirrors `struct Arguments` of templates/cpu/select_kv.cpp.jinja, field for field."""

    _POINTERS = (
        *("scores", "thresholds", "histogram", "prefix_lens", "page_table", "indices", "counts", "slots"),
        "workspace",
    )
    _STRIDES = (
        *("score_layer", "score_request", "score_row", "threshold_layer", "threshold_request", "threshold_row"),
        "table_request",
    )
    _KEYS = ("policy", "k", "ratio_ppm", "min_keys", "max_keys", "sink", "recent", "block")
    _SIZES = (
        *("layers", "batch", "rows", "columns", "united", "width", "bisection_steps", "pages", "slots_per_page"),
        *("slot_bytes", "threads"),
    )
    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in (*_STRIDES, *_KEYS)),
        *(("share", ctypes.c_double), ("threshold", ctypes.c_float)),
        *((name, ctypes.c_int32) for name in _SIZES),
    )


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _attention_arguments(call: AttentionCall, split_keys: int) -> _AttentionArguments:
    q, k, v, out = call.q.stride(), call.k_cache.stride(), call.v_cache.stride(), call.out.stride()
    scores = (0, 0) if call.scores is None else call.scores.stride()[:2]
    index = (0, 0) if call.indices is None else call.indices.stride()[:2]
    return _AttentionArguments(
        *(_address(t) for t in (call.q, call.k_cache, call.v_cache, call.out, call.lse, call.scores, call.histogram)),
        *(_address(t) for t in (call.sinks, call.lse_ref, call.k_scale, call.v_scale)),
        *(_address(t) for t in (call.page_table, call.kv_lens, call.cu_q, call.indices, call.counts, call.slots)),
        *(_address(call.tail_start), _address(call.mode), None),
        *(q[0], q[1], *k[:3], *v[:3], out[0], out[1], call.page_table.stride(0), *scores, *index),
        *(0 if scale is None else scale.stride(0) for scale in (call.k_scale, call.v_scale)),
        *(call.batch, *call.k_cache.shape[:2], call.max_q, call.max_kv),
        *(0 if call.indices is None else call.indices.shape[2], call.block),
        0 if call.slots is None else call.slots.element_size(),
        split_keys,
        torch.get_num_threads(),
    )


def _select_arguments(call: SelectCall) -> _SelectArguments:
    table = call.page_table
    score_strides = (0,) * (4 - call.scores.dim()) + call.scores.stride()[:-1]
    threshold_strides = (0, 0, 0)
    if call.thresholds is not None:
        threshold_strides = (0,) * (3 - call.thresholds.dim()) + call.thresholds.stride()
    numbers = policy_numbers(call.policy)
    return _SelectArguments(
        *(_address(t) for t in (call.scores, call.thresholds, call.histogram, call.prefix_lens, table)),
        *(_address(t) for t in (call.indices, call.counts, call.slots)),
        None,
        *(*score_strides, *threshold_strides, 0 if table is None else table.stride(0)),
        *(numbers.policy, numbers.k, numbers.ratio_ppm, numbers.min_keys, numbers.max_keys),
        *(call.sink, call.recent, call.block),
        *(numbers.share, numbers.threshold),
        *(*call.shape, call.union, call.indices.shape[-1], numbers.bisection_steps),
        *(0 if table is None else table.shape[1], call.slots_per_page),
        *(0 if call.slots is None else call.slots.element_size(), torch.get_num_threads()),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuKernel:
    """A loaded shared object. Reads lengths from host memory and runs on torch's own OpenMP threads."""

    spec: KernelSpec
    plan: Plan
    library: ctypes.CDLL

    def workspace_bytes(self, call: Call) -> int:
        return self.library.workspace_bytes(ctypes.byref(_arguments(call, self.plan)))

    def launch(self, call: Call, workspace: torch.Tensor) -> None:
        arguments = _arguments(call, self.plan)
        arguments.workspace = workspace.data_ptr()
        failure = self.library.run(ctypes.byref(arguments))
        if not failure:
            return
        if isinstance(call, SelectCall):
            raise SpecError(
                f"scores: {call.policy} needs masses, finite and not negative, and a row has other scores; "
                "ask verification for value='weight', or select by TopK or Threshold"
            )
        if failure == STRAY_PAGE:
            raise SpecError(_stray_page(call))
        raise BuildError(
            f"{self.spec.name}: the system does not lend AMX tile registers to this process; "
            "use a plan with product=fma"
        )


def _stray_page(call: AttentionCall) -> str:
    """Which entry of the page table names a page that the cache does not have."""
    pages, page_size = call.k_cache.shape[:2]
    for request, length in enumerate(call.kv_lens.tolist()):
        for entry, page in enumerate(call.page_table[request, : -(-length // page_size)].tolist()):
            if not 0 <= page < pages:
                return (
                    f"page_table[{request}, {entry}]={page}: the cache has {pages} pages, and this request's {length} "
                    "keys reach into that entry; name one of them (what this call wrote is of no use)"
                )
    raise AssertionError("the kernel met a page that the page table does not name")


def _arguments(call: Call, plan: Plan) -> _AttentionArguments | _SelectArguments:
    """The length of a split is an argument rather than a constant, so that plans which differ by it share a binary."""
    if isinstance(call, SelectCall):
        return _select_arguments(call)
    return _attention_arguments(call, plan.integer("split_keys"))


def load(source: Source) -> CpuKernel:
    """The kernel of a rendered source."""
    library = load_library(source.text, source.target, f"{source.spec.name} ({source.plan})")
    library.workspace_bytes.restype = ctypes.c_int64
    library.run.restype = ctypes.c_int
    return CpuKernel(spec=source.spec, plan=source.plan, library=library)
