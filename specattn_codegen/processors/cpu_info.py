"""The CPU at hand as an Arch: instruction set, cores and caches are read, its rates measured once and cached."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import json
import math
import os
import platform
from pathlib import Path

import torch

from specattn_codegen import paths
from specattn_codegen.build import cpu
from specattn_codegen.digest import digest
from specattn_codegen.processors.arch import Arch
from specattn_codegen.render import render_text

# What each target's compiler flags need of the processor, widest first.
_AVX512 = {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx2", "fma", "f16c"}
NEEDS = {
    "amx-bf16": {"amx_tile", "amx_bf16", "avx512_bf16", *_AVX512},
    "avx512-bf16": {"avx512_bf16", *_AVX512},
    "avx512": _AVX512,
    "avx2": {"avx2", "fma", "f16c"},
    "generic": set[str](),
}
DEFAULT_LAST_LEVEL_CACHE = 32 << 20  # where the kernel does not say
READ_CACHES = 16  # what a read ceiling goes over, in last-level caches: four still find an eighth of it there
REPEATS = 5
RATES = ("bandwidth_gbs", "fp32_tflops", "bf16_tflops")


@functools.cache
def _cpuinfo() -> dict[str, str]:
    """The first processor's fields of /proc/cpuinfo; empty where there is none."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {name.strip(): value.strip() for name, _, value in pairs}


def instruction_set() -> str:
    """The widest target this processor runs."""
    flags = set(_cpuinfo().get("flags", "").split())
    if "amx_tile" in flags and not _tiles_are_lent():
        flags.remove("amx_tile")
    return next(target for target, needed in NEEDS.items() if needed <= flags)


def _tiles_are_lent() -> bool:
    """Linux lends AMX tile registers on request; containers and old kernels may refuse (arch_prctl(2))."""
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    return ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data) == 0


def core_count() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cache_bytes(text: str) -> int:
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    return int(text[:-1]) * units[text[-1]] if text[-1] in units else int(text)


def last_level_cache(root: Path = Path("/sys/devices/system/cpu")) -> int:
    """Bytes of every last-level cache together: a processor may have one for each few of its cores."""
    deepest: dict[str, tuple[int, int]] = {}
    for index in root.glob("cpu[0-9]*/cache/index*"):
        try:
            level, size = int((index / "level").read_text()), _cache_bytes((index / "size").read_text().strip())
            shared_by = (index / "shared_cpu_list").read_text().strip()
        except OSError:
            continue  # a core that is offline
        deepest[shared_by] = max(deepest.get(shared_by, (0, 0)), (level, size))
    last = max((level for level, _ in deepest.values()), default=0)
    return sum(size for level, size in deepest.values() if level == last) or DEFAULT_LAST_LEVEL_CACHE


def memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def read_bytes(cache_bytes: int) -> int:
    """What a read ceiling goes over."""
    return min(READ_CACHES * cache_bytes, memory_bytes() // 4)


def measure_rates(target: str, threads: int, cache_bytes: int) -> dict[str, float]:
    """bandwidth_gbs: best of several read patterns over many times the last-level cache; fp32_tflops and bf16_tflops:
    the multiply-add rates. All threads; best of several repeats, since these are ceilings."""
    library = cpu.load_library(render_text("cpu/probe.cpp.jinja", target=target), target, "the machine probe")
    for function in (library.read_seconds, library.multiply_add_seconds, library.bf16_seconds):
        function.restype = ctypes.c_double
    count = read_bytes(cache_bytes) // 4
    data, sink = torch.ones(count), torch.empty(threads)
    pointer, sink_pointer = ctypes.c_void_p(data.data_ptr()), ctypes.c_void_p(sink.data_ptr())
    read = min(
        library.read_seconds(pointer, ctypes.c_int64(count), threads, pattern, sink_pointer)
        for _ in range(REPEATS)
        for pattern in range(library.patterns())
    )
    steps = 2_000_000
    fp32, bf16 = (
        min(run(ctypes.c_int64(steps), threads, sink_pointer) for _ in range(REPEATS))
        for run in (library.multiply_add_seconds, library.bf16_seconds)
    )
    return {
        "bandwidth_gbs": round(4 * count / read / 1e9, 2),
        "fp32_tflops": round(library.flops_per_step() * steps * threads / fp32 / 1e12, 4),
        "bf16_tflops": round(library.bf16_flops_per_step() * steps * threads / bf16 / 1e12, 4),
    }


def _cached_rates(target: str, threads: int, cache_bytes: int, *, refresh: bool) -> dict[str, float]:
    """Rates are ceilings, so of several measurements the best is kept: a busy moment must not lower one for good."""
    model = _cpuinfo().get("model name", platform.processor())
    file = paths.cache_dir() / "machine" / f"{digest(model, target, threads, read_bytes(cache_bytes))}.json"
    known: dict[str, float] = {}
    try:
        stored = json.loads(file.read_text())
        if all(math.isfinite(stored[name]) and stored[name] > 0 for name in RATES):
            known = stored
    except (OSError, ValueError, KeyError, TypeError):
        pass  # absent or damaged: measure again
    if known and not refresh:
        return known
    measured = measure_rates(target, threads, cache_bytes)
    rates = {name: max(measured[name], known.get(name, 0.0)) for name in RATES}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        scratch = file.with_suffix(f".{os.getpid()}")
        scratch.write_text(json.dumps(rates))
        scratch.replace(file)
    except OSError:
        pass  # a read-only cache costs a second per process, nothing else
    return rates


def model() -> str:
    """Vendor, family and model as the processor itself gives them, such as `AuthenticAMD 25 17`: a guest may not see
    its product's name. Empty where the system does not say."""
    facts = _cpuinfo()
    x86, arm = ("vendor_id", "cpu family", "model"), ("CPU implementer", "CPU variant", "CPU part")
    return " ".join(facts[name] for name in (*x86, *arm) if name in facts)


def like(target: str, cores: int, cache_bytes: int, cpu_model: str) -> Arch:
    """A CPU that is not here, by what identifies it; its rates are this one's."""
    return dataclasses.replace(
        detect(), target=target, num_sms=cores, l2_bytes=cache_bytes, cpu_model=cpu_model, source="a record"
    )


@functools.cache
def detect(*, measure: bool = True, refresh: bool = False) -> Arch:
    """This machine's CPU. `measure=False` leaves the rates at 0, for callers that only need to build and run;
    `refresh=True` measures even where the cache has rates, for callers that compare with them."""
    target, cores, cache = instruction_set(), core_count(), last_level_cache()
    rates = _cached_rates(target, cores, cache, refresh=refresh) if measure else dict.fromkeys(RATES, 0.0)
    return Arch(
        name="cpu",
        vendor="cpu",
        compute_capability=0,
        target=target,
        num_sms=cores,
        smem_per_block=0,
        smem_per_sm=0,
        registers_per_sm=0,
        max_threads_per_sm=1,
        warp_size=1,
        l2_bytes=cache,
        memory_bytes=memory_bytes(),
        bandwidth_gbs=rates["bandwidth_gbs"],
        bf16_tflops=rates["bf16_tflops"],
        fp32_tflops=rates["fp32_tflops"],
        clock_ghz=float(_cpuinfo().get("cpu MHz", 0.0)) / 1e3,
        source=f"this machine: {_cpuinfo().get('model name', platform.machine())}",
        cpu_model=model(),
    )
