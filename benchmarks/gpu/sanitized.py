"""A small launch of a kernel of each operation, for compute-sanitizer to watch. Exits with 1 where one is wrong."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Iterable

from benchmarks.gpu import sizes
from benchmarks.gpu.sizes import PAGE_SIZE
from specattn_codegen import build, space
from specattn_codegen.heads import HeadConfig
from specattn_codegen.processors import cpu_info, gpu_detect
from specattn_codegen.proof.prove import Extent, prove
from specattn_codegen.spec import KernelSpec, ScoreSpec, Workload
from specattn_codegen.tuning.jobs import render_for
from specattn_codegen.tuning.measure import device_of
from specattn_codegen.workloads import select_spec

HEADS = HeadConfig(num_q_heads=8, num_kv_heads=2, head_dim=64)  # few, as the tools slow a kernel down hundredfold
EXTENT = Extent(keys=300, ragged=130, rows=4)
WORKLOAD = Workload(batch=1, q_len=4, kv_len=300, budget=40)


def sample(heads: HeadConfig, scores: Iterable[ScoreSpec], page_size: int) -> list[KernelSpec]:
    attention = functools.partial(KernelSpec, heads=heads, dtype="bfloat16", page_size=page_size)
    scored = [attention(op="verify_attention", score=score) for score in scores]
    return [*scored, attention(op="sparse_attention", selection="kv_head"), select_spec(heads, layer_shared=False)]


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rehearse", action="store_true")
    rehearsal = parser.parse_args().rehearse
    arch = cpu_info.detect(measure=False) if rehearsal else gpu_detect.local()
    asked = sizes.rehearsed() if rehearsal else sizes.on_gpu()
    heads = asked.model.heads if rehearsal else HEADS
    wrong = 0
    for spec in sample(heads, asked.scores.values(), PAGE_SIZE if arch.is_gpu else 0):
        plan = space.default_plan(spec, arch, space.backends_for(arch)[0])
        kernel = build.load(render_for(spec, plan, arch))
        device = device_of(arch)
        verdict = prove(kernel, workload=WORKLOAD, page_size=PAGE_SIZE, seed=1, device=device, extent=EXTENT)
        print(f"{spec.name}: {verdict.detail}")
        wrong += not verdict.passed
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
