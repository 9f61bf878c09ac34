"""What the device is and can do at all: reading, copying, multiplying, launching."""

from __future__ import annotations

import functools
import importlib.util
import platform
import shutil
import subprocess
from importlib import metadata

import torch

from benchmarks.gpu import streaming
from benchmarks.gpu.journal import Answer
from benchmarks.gpu.session import Session, Step, Steps
from specattn_codegen import environment
from specattn_codegen.digest import to_plain
from specattn_codegen.tuning.measure import Launch

PACKAGES = ("torch", "triton", "numpy", "jinja2", "msgspec", "platformdirs", "filelock", "flashinfer", "tilelang")
PROGRAMS = ("nvidia-smi", "nvcc", "compute-sanitizer", "ncu", "cuobjdump")
STATE = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,temperature.gpu,power.draw,memory.used,utilization.gpu"
READ_TILES = ((1024, 4), (2048, 8), (4096, 8), (8192, 16))  # elements and warps


def steps(session: Session) -> Steps:
    yield Step(key="ceilings/environment", seconds=5, run=functools.partial(describe, session))
    yield Step(key="ceilings/read", seconds=15, run=functools.partial(read_bandwidth, session))
    yield Step(key="ceilings/copy", seconds=10, run=functools.partial(copy_bandwidth, session))
    yield Step(key="ceilings/matrix", seconds=10, run=functools.partial(matrix_rate, session))
    yield Step(key="ceilings/launch", seconds=10, run=functools.partial(launch_cost, session))


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "present" if importlib.util.find_spec(package) else None


def device_state() -> list[str]:
    """What the driver says of clocks, heat and others' use; empty where there is no driver."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    command = [program, f"--query-gpu={STATE}", "--format=csv"]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=20).stdout.splitlines()


def describe(session: Session) -> Answer:
    target = session.target
    device = environment.device_name(session.arch)
    return session.label(
        {
            "arch": to_plain(session.arch),
            "environment": to_plain(environment.current(target.backend, device)),
            "python": platform.python_version(),
            "packages": {name: _version(name) for name in PACKAGES},
            "programs": {name: shutil.which(name) for name in PROGRAMS},
            "state": device_state(),
        }
    )


def read_bandwidth(session: Session) -> Answer:
    """The best of several patterns over far more than the last-level cache, 10^9 bytes a second."""
    count = session.sizes.read_bytes // 4
    source = torch.randint(0, 7, (count,), dtype=torch.int32, device=session.device)
    sums = torch.empty(count // streaming.TILES_PER_PROGRAM, dtype=torch.int32, device=session.device)
    launches: dict[str, Launch] = {
        f"tiles of {tile}, {warps} warps": functools.partial(streaming.read, source, sums, tile, warps)
        for tile, warps in READ_TILES
        if count % (streaming.TILES_PER_PROGRAM * tile) == 0
    }
    as_floats = source.view(torch.float32)
    launches["torch.amax"] = lambda: torch.amax(as_floats, out=sums.view(torch.float32)[0])
    found = dict(zip(launches, session.time(*launches.values()), strict=True))
    rates = {name: source.nbytes / timing.median_us / 1e3 for name, timing in found.items()}
    return session.label({"bytes": source.nbytes, "gbs": max(rates.values()), "patterns": rates})


def copy_bandwidth(session: Session) -> Answer:
    """Bytes read and written, 10^9 a second."""
    source = torch.ones(session.sizes.read_bytes // 8, dtype=torch.int32, device=session.device)
    target = torch.empty_like(source)
    (timing,) = session.time(lambda: target.copy_(source))
    return session.label({"bytes": 2 * source.nbytes, "gbs": 2 * source.nbytes / timing.median_us / 1e3})


def matrix_rate(session: Session) -> Answer:
    """torch's product of square matrices of random numbers, 10^12 operations a second by dtype."""
    extent = session.sizes.matrix_extent
    rates: dict[str, float] = {}
    for dtype in (torch.bfloat16, torch.float16):
        first, second = torch.randn(2, extent, extent, device=session.device).to(dtype)
        result = torch.empty_like(first)
        (timing,) = session.time(functools.partial(_multiply, first, second, result))
        rates[str(dtype).removeprefix("torch.")] = 2 * extent**3 / timing.median_us / 1e6
    return session.label({"extent": extent, "tflops": rates})


def _multiply(first: torch.Tensor, second: torch.Tensor, result: torch.Tensor) -> None:
    torch.mm(first, second, out=result)


def launch_cost(session: Session) -> Answer:
    """Microseconds a kernel that does nothing costs: launched by the host, and as a node of a graph."""
    source = torch.zeros(streaming.TILES_PER_PROGRAM * 64, dtype=torch.int32, device=session.device)
    sums = torch.empty(1, dtype=torch.int32, device=session.device)

    def launches(count: int) -> None:
        for _ in range(count):
            streaming.read(source, sums, 64, 4)

    count = session.sizes.launches
    few, many = functools.partial(launches, count), functools.partial(launches, 2 * count)
    eager = session.time(few, many)
    graph = session.time(session.captured(few), session.captured(many))
    return session.label(
        {
            "eager_us": (eager[1].median_us - eager[0].median_us) / count,
            "graph_node_us": (graph[1].median_us - graph[0].median_us) / count,
        }
    )
