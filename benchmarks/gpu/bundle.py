"""The wheels that a machine without a network needs besides torch, Triton, NumPy and Jinja2."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from specattn_codegen.errors import SpecError

PYTHON = "3.12"
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
# What the campaign's path imports of this project, and pytest for the tests marked gpu.
NEEDED = ("msgspec", "platformdirs", "filelock", "markupsafe")
TESTS = ("pytest", "pluggy", "iniconfig", "packaging", "pygments")
PEERS = ("flashinfer-python<0.7", "apache-tvm-ffi", "einops", "tabulate", "tqdm", "ninja", "requests", "nvidia-ml-py")
SITE = "/tmp/site"


def make(folder: Path, *, with_peers: bool) -> str:
    """Fills a folder with wheels of CPython 3.12 on x86-64 Linux. How to use them. Raises SpecError."""
    names = (*NEEDED, *TESTS, *(PEERS if with_peers else ()))
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", PYTHON, "--implementation", "cp"]
    command += [part for platform in PLATFORMS for part in ("--platform", platform)]
    ended = subprocess.run([*command, "-d", str(folder), *names], capture_output=True, text=True, check=False)
    if ended.returncode:
        reason = ended.stderr.strip().splitlines()[-1:] or ["pip gave no reason"]
        raise SpecError(f"the wheels could not be downloaded: {reason[0]}; this needs pip and a package index")
    wheels = sorted(folder.glob("*.whl"))
    size = sum(wheel.stat().st_size for wheel in wheels) / 2**20
    return (
        f"{len(wheels)} wheels, {size:.1f} MiB, in {folder}. There, from the checkout:\n"
        f"  python3 -m pip install -q --no-index --no-deps --no-compile --target {SITE} {folder}/*.whl\n"
        f"  PYTHONPATH={SITE} python3 -m benchmarks.gpu --out results --minutes 9"
    )
