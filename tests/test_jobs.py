"""What a proof in the interpreter covers."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from specattn_codegen import space
from specattn_codegen.build import triton as triton_build
from specattn_codegen.heads import HeadConfig
from specattn_codegen.processors import gpus
from specattn_codegen.proof.prove import attention_problems
from specattn_codegen.spec import KernelSpec, ScoreSpec, Workload
from specattn_codegen.tuning import jobs
from specattn_codegen.tuning.jobs import InterpretJob, failed_launch, interpreted_twin, render_for
from specattn_codegen.tuning.outcome import POISONED, Status

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


class AskedError(Exception):
    """A proof was made."""


def test_a_verdict_serves_every_gpu_and_every_size_that_the_proof_cannot_tell_apart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small = spec((2, 1, 16))
    plan = space.default_plan(small, ARCH, "triton")
    job = InterpretJob(spec=small, plan=plan, arch=ARCH, workload=WORKLOAD, seed=0)
    first = job.run()
    assert first.status is Status.OK

    def asked(*_: object, **__: object) -> None:
        raise AskedError

    monkeypatch.setattr(jobs, "prove", asked)
    longer = dataclasses.replace(WORKLOAD, batch=1, kv_len=131072)
    for same in ({}, {"arch": gpus.find("h100")}, {"workload": longer}):
        assert dataclasses.replace(job, **same).run() == first
    fewer = dataclasses.replace(WORKLOAD, q_len=1)
    for other in ({"seed": 1}, {"workload": fewer}, {"plan": plan.replace(num_warps=2)}):
        with pytest.raises(AskedError):
            dataclasses.replace(job, **other).run()


def test_a_verdict_is_not_believed_of_another_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept for one kernel says nothing of one that differs in a single line."""
    small = spec((2, 1, 16))
    job = InterpretJob(spec=small, plan=space.default_plan(small, ARCH, "triton"), arch=ARCH, workload=WORKLOAD, seed=0)
    assert job.run().status is Status.OK

    def doubled(*arguments: object) -> object:
        source = render_for(*arguments)  # pyright: ignore[reportArgumentType]
        text = source.text.replace("LOGIT_SCALE = tl.constexpr(", "LOGIT_SCALE = tl.constexpr(2.0 * ")
        assert text != source.text
        return dataclasses.replace(source, text=text)

    monkeypatch.setattr(jobs, "render_for", doubled)
    assert job.run().status is Status.WRONG


@pytest.mark.parametrize(
    ("error", "poisons"),
    [
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nCompile with more."), True),
        (torch.OutOfMemoryError("CUDA out of memory\nTried more."), False),
    ],
)
def test_only_an_error_of_the_device_counts_against_a_binary(error: Exception, poisons: bool) -> None:
    outcome = failed_launch(error)
    assert outcome.status is Status.RUNTIME
    assert outcome.detail == f"{POISONED * poisons}{str(error).splitlines()[0]}"
