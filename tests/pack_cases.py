"""Packs for tests: entries of made-up times, on disk where a test wants them."""

from __future__ import annotations

from pathlib import Path

from specattn_codegen import space
from specattn_codegen.build.resources import Resources
from specattn_codegen.environment import current
from specattn_codegen.heads import HeadConfig
from specattn_codegen.packs import pack
from specattn_codegen.packs.pack import ChosenBy, Entry
from specattn_codegen.packs.staleness import space_digest
from specattn_codegen.processors import gpus
from specattn_codegen.processors.arch import Arch
from specattn_codegen.render import render
from specattn_codegen.spec import KernelSpec, ScoreSpec, Workload

ARCH = gpus.find("h100")
HEADS = HeadConfig(num_q_heads=32, num_kv_heads=8, head_dim=128)
VERIFY = KernelSpec(op="verify_attention", heads=HEADS, dtype="bfloat16", page_size=16)
SCORED = KernelSpec(op="verify_attention", heads=HEADS, dtype="bfloat16", page_size=16, score=ScoreSpec())
SELECT = KernelSpec(op="select_kv", heads=HEADS, selection="kv_head")
SMALL = Workload(batch=1, q_len=7, kv_len=4096)
LARGE = Workload(batch=1, q_len=7, kv_len=131072)


def entry(
    spec: KernelSpec = VERIFY,
    workload: Workload = SMALL,
    chosen_by: ChosenBy = "modelled",
    latency_us: float = 12.5,
    **settings: int | str,
) -> Entry:
    plan = space.default_plan(spec, ARCH, "triton").replace(**settings)
    return Entry(
        spec=spec,
        workload=workload,
        plan=plan,
        chosen_by=chosen_by,
        proved_by="device" if chosen_by == "measured" else "interpreter-float16-twin",
        latency_us=latency_us,
        noise_us=0.0,
        share_of_ceiling=0.5,
        resources=(
            Resources(
                kernel="attend_splits", registers=96, spill_bytes=0, smem_bytes=40960, num_warps=4, binary_bytes=9
            ),
        ),
        source_digest=render(spec, plan, "triton").digest,
        environment=current("triton", None),
        space_digest=space_digest(spec, "triton"),
    )


def publish(root: Path, *entries: Entry, arch: Arch = ARCH) -> Path:
    return pack.publish(root, arch, HEADS, entries)
