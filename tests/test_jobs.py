"""What a proof in the interpreter covers."""

from __future__ import annotations

import pytest

from specattn_codegen import gpus, space
from specattn_codegen.build import triton as triton_build
from specattn_codegen.heads import HeadConfig
from specattn_codegen.jobs import InterpretJob, interpreted_twin, render_for
from specattn_codegen.prove import attention_problems
from specattn_codegen.spec import KernelSpec, ScoreSpec, Workload

ARCH = gpus.find("a100")
WORKLOAD = Workload(batch=16, q_len=7, kv_len=32768)
SHAPES = [(32, 8, 128), (71, 1, 64), (12, 12, 64)]


def spec(shape: tuple[int, int, int]) -> KernelSpec:
    query, kv, dim = shape
    heads = HeadConfig(num_q_heads=query, num_kv_heads=kv, head_dim=dim)
    return KernelSpec(op="verify_attention", heads=heads, dtype="bfloat16", page_size=16, score=ScoreSpec())


@pytest.mark.parametrize("shape", SHAPES)
def test_every_proof_covers_all_heads_several_row_tiles_and_several_splits(shape: tuple[int, int, int]) -> None:
    twin = interpreted_twin(spec(shape))
    assert twin.dtype == "float16"
    for plan in list(space.feasible(twin, ARCH, "triton"))[::193]:
        all_heads, splits, row_tiles = False, 0, 0
        for proved, extent in InterpretJob.proofs(twin, plan):
            module = triton_build.import_source(render_for(proved, plan, ARCH))
            all_heads |= proved == twin
            for problem in attention_problems(proved, WORKLOAD, 16, 0, extent):
                batch = len(problem.kv_lens)
                splits = max(
                    splits,
                    module.num_splits(batch, problem.max_q, problem.max_kv, triton_build.INTERPRETER_SMS),
                )
                row_tiles = max(row_tiles, -(-problem.max_q * proved.heads.group // plan.integer("block_m")))
        assert all_heads
        assert splits >= 2
        assert row_tiles >= 2 or twin.heads.group * WORKLOAD.q_len <= plan.integer("block_m")
