"""What a GPU binary takes, read from its vendor's own listing. Knows nothing of how the binary was built."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from triton import knobs

from specattn_codegen.errors import BuildError


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """registers: 32-bit, per thread; spill_bytes: stack per thread; smem_bytes: static shared memory per block."""

    registers: int
    spill_bytes: int
    smem_bytes: int


def _field(pattern: str, text: str, what: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise BuildError(f"no {what} in the description of the compiled kernel")
    return int(found.group(1))


def cubin_usage(cubin: Path, kernel: str, cuobjdump: str) -> Usage:
    """Reads one kernel of an NVIDIA binary with `cuobjdump -res-usage`. Raises BuildError."""
    listing = subprocess.run([cuobjdump, "-res-usage", str(cubin)], capture_output=True, text=True, check=False)
    if listing.returncode:
        raise BuildError(f"cuobjdump failed on {kernel}: {listing.stderr.strip() or listing.stdout.strip()}")
    function = re.search(rf"Function {re.escape(kernel)}:\s*\n(.*)", listing.stdout)
    if function is None:
        raise BuildError(f"cuobjdump lists no function {kernel}")
    usage = function.group(1)
    return Usage(
        registers=_field(r"REG:(\d+)", usage, "REG"),
        spill_bytes=_field(r"STACK:(\d+)", usage, "STACK"),
        smem_bytes=_field(r"SHARED:(\d+)", usage, "SHARED"),
    )


def cuobjdump_path() -> str:
    """NVIDIA's disassembler: on the PATH, or the one that comes with Triton."""
    return shutil.which("cuobjdump") or knobs.nvidia.cuobjdump.path


def sass_opcodes(cubin: Path) -> Counter[str]:
    """How often each opcode, modifiers included, stands in an NVIDIA binary. Raises BuildError."""
    command = [cuobjdump_path(), "-sass", str(cubin)]
    listing = subprocess.run(command, capture_output=True, text=True, check=False)
    if listing.returncode:
        raise BuildError(f"cuobjdump failed: {listing.stderr.strip() or listing.stdout.strip()}")
    # One instruction a line: its address, perhaps a predicate, its opcode.
    return Counter(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", listing.stdout, re.MULTILINE))


def amdgcn_usage(assembly: str) -> Usage:
    """Reads the kernel metadata that closes an AMD assembly listing. Raises BuildError."""
    return Usage(
        registers=_field(r"\.vgpr_count:\s+(\d+)", assembly, ".vgpr_count"),
        spill_bytes=_field(r"\.private_segment_fixed_size:\s+(\d+)", assembly, ".private_segment_fixed_size"),
        smem_bytes=_field(r"\.group_segment_fixed_size:\s+(\d+)", assembly, ".group_segment_fixed_size"),
    )
