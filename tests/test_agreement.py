"""require_agreement among real processes: equal packs pass, another plan on one rank is refused on all, and processes
that are frozen go on agreeing while a pack changes under them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from specattn_codegen import space
from specattn_codegen.heads import HeadConfig
from specattn_codegen.processors import cpu_info
from specattn_codegen.spec import KernelSpec
from test_dispatch_packs import published

RANK = """
import shutil, sys, torch.distributed as dist
from specattn_codegen import HeadConfig, SpecError
from specattn_runtime import load_kernels, require_agreement
rank, meeting, packs, others = int(sys.argv[1]), *sys.argv[2:]
dist.init_process_group("gloo", init_method="file://" + meeting, rank=rank, world_size=2)
heads = HeadConfig(num_q_heads=8, num_kv_heads=2, head_dim=32)
require_agreement(load_kernels(heads, packs=packs))
try:
    require_agreement(load_kernels(heads, packs=others if rank else packs))
except SpecError as error:
    print(error)
before = load_kernels(heads, packs=packs, frozen=True)
dist.barrier()
if rank == 0:
    shutil.copy(others, packs)
dist.barrier()
frozen = load_kernels(heads, packs=packs, frozen=True)
assert frozen.digest == before.digest  # as it was read, though the file is another by now
require_agreement(frozen)
try:
    require_agreement(load_kernels(heads, packs=packs, frozen=rank == 0))
except SpecError as error:
    print("not all are frozen")
dist.destroy_process_group()
"""


def test_ranks_agree_or_all_hear_who_does_not(tmp_path: Path) -> None:
    spec = KernelSpec(op="verify_attention", heads=HeadConfig(num_q_heads=8, num_kv_heads=2, head_dim=32))
    plans = space.feasible(spec, cpu_info.detect(measure=False), "cpu")
    packs = [published(tmp_path / name, next(plans)) for name in ("ours", "theirs")]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(tmp_path / "meeting"), *map(str, packs)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    heard = [rank.communicate(timeout=240) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], heard
    lines = {out.strip() for out, _ in heard}
    assert len(lines) == 1
    assert next(iter(lines)).endswith("\nnot all are frozen")
    assert "ranks would not choose the same kernels" in next(iter(lines))
    assert ": ranks 0; " in next(iter(lines))
