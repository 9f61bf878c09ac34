"""Proofs: right kernels pass and every kind of wrong one fails."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from specattn_codegen import build, space
from specattn_codegen.heads import HeadConfig
from specattn_codegen.kernel import AttentionCall, Call, Kernel, SelectCall
from specattn_codegen.plan import Plan
from specattn_codegen.policy import Threshold, TopP
from specattn_codegen.processors import cpu_info
from specattn_codegen.proof import prove
from specattn_codegen.proof.prove import Extent
from specattn_codegen.render import render
from specattn_codegen.spec import KernelSpec, ScoreSpec, Workload

HEADS = HeadConfig(num_q_heads=8, num_kv_heads=2, head_dim=32)
SPECS = {
    "verify": KernelSpec(op="verify_attention", heads=HEADS, score=ScoreSpec()),
    "sparse": KernelSpec(op="sparse_attention", heads=HEADS, selection="kv_head"),
    "select": KernelSpec(op="select_kv", heads=HEADS, selection="kv_head"),
}
EXTENT = Extent(keys=300, ragged=150, rows=8)


@dataclass(frozen=True)
class Spoiled:
    """A kernel with something done to its results."""

    right: Kernel
    spoil: Callable[[Call], None]

    @property
    def spec(self) -> KernelSpec:
        return self.right.spec

    @property
    def plan(self) -> Plan:
        return self.right.plan

    def workspace_bytes(self, call: Call) -> int:
        return self.right.workspace_bytes(call)

    def launch(self, call: Call, workspace: torch.Tensor) -> None:
        self.right.launch(call, workspace)
        self.spoil(call)


def kernel(name: str) -> Kernel:
    spec, arch = SPECS[name], cpu_info.detect(measure=False)
    plan = space.default_plan(spec, arch, "cpu")
    return build.load(render(spec, plan, build.target_for(plan, arch)))


def verdict(candidate: Kernel) -> bool:
    workload = Workload(batch=2, q_len=3, kv_len=400, budget=40)
    return prove.prove(candidate, workload=workload, page_size=16, seed=0, device="cpu", extent=EXTENT).passed


@pytest.mark.parametrize("name", SPECS)
def test_a_right_kernel_passes(name: str) -> None:
    assert verdict(kernel(name))


def one_output_off(call: Call) -> None:
    assert isinstance(call, AttentionCall)
    call.out[-1, -1, -1] += 1e-3


def one_unwritten(call: Call) -> None:
    assert isinstance(call, AttentionCall)
    call.lse[0, 0] = float("nan")


def scores_of_another_head(call: Call) -> None:
    assert isinstance(call, AttentionCall)
    assert call.scores is not None
    call.scores.copy_(call.scores.flip(1))


def one_key_other(call: Call) -> None:
    assert isinstance(call, SelectCall)
    call.indices[0, 0, 0] += 1


def one_count_off(call: Call) -> None:
    assert isinstance(call, SelectCall)
    call.counts[-1, -1] -= 1


def one_slot_off(call: Call) -> None:
    assert isinstance(call, SelectCall)
    if call.slots is not None:
        call.slots[0, 0, 0, 0] += 1


def one_key_short_of_the_share(call: Call) -> None:
    assert isinstance(call, SelectCall)
    if isinstance(call.policy, TopP):
        call.counts[-1, 0] -= 1
        call.indices[-1, 0, int(call.counts[-1, 0])] = -1


def one_key_over_the_threshold(call: Call) -> None:
    assert isinstance(call, SelectCall)
    if isinstance(call.policy, Threshold):
        call.counts[0, 0, 0] += 1


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("verify", one_output_off),
        ("verify", one_unwritten),
        ("verify", scores_of_another_head),
        ("sparse", one_output_off),
        ("select", one_key_other),
        ("select", one_count_off),
        ("select", one_slot_off),
        ("select", one_key_short_of_the_share),
        ("select", one_key_over_the_threshold),
    ],
)
def test_a_wrong_kernel_fails(name: str, spoil: Callable[[Call], None]) -> None:
    assert not verdict(Spoiled(kernel(name), spoil))


def test_problems_are_ragged_and_then_the_workloads_own() -> None:
    workload = Workload(batch=4, q_len=7, kv_len=32768, budget=2000)
    ragged, own = prove.attention_problems(SPECS["sparse"], workload, 16, 0, prove.ON_DEVICE)
    assert 0 in ragged.kv_lens.tolist()
    assert 7 in ragged.kv_lens.tolist()  # rows without a prefix
    assert own.kv_lens.tolist() == [prove.ON_DEVICE.keys]
    assert own.max_q == 7
