"""The cost model of the CPU: its rules are the template's, and its first choice is good where every plan was timed."""

from __future__ import annotations

import dataclasses
import json

import pytest

from specattn_bench import report, sweep_cases
from specattn_bench.sweep_cases import CASES
from specattn_codegen import space
from specattn_codegen.build import target_for
from specattn_codegen.cost_model import cpu, latency_us
from specattn_codegen.heads import HeadConfig
from specattn_codegen.processors import cpu_info
from specattn_codegen.processors.arch import Arch
from specattn_codegen.render import render
from specattn_codegen.spec import Dtype, KernelSpec, Workload

EPYC = "AMD EPYC"
FAR_FROM_BEST = 0.15  # what the first choice may cost where no plan has been timed yet
HEADS = HeadConfig(num_q_heads=32, num_kv_heads=8, head_dim=128)


def epyc() -> Arch:
    """The processor the sweeps were made on, with the rates it had when searches were compared on them."""
    here = dataclasses.replace(cpu_info.detect(measure=False), source=f"this machine: {EPYC}", target="avx512-bf16")
    rates = json.loads(report.saved_path(here, "search").read_text())["rates"]
    return dataclasses.replace(here, num_sms=2, l2_bytes=32 << 20, **rates)


@pytest.mark.parametrize("name", CASES)
def test_the_first_choice_is_near_the_best_of_all_plans(name: str) -> None:
    case, arch = CASES[name], epyc()
    times = sweep_cases.read(sweep_cases.sweep_path(arch, case)).times_us
    first = min(times, key=lambda plan: latency_us(case.spec, case.workload, plan, arch, ()))
    assert times[first] <= (1 + FAR_FROM_BEST) * min(times.values())


@pytest.mark.parametrize(
    ("dtype", "q_len", "heads_per_task", "strips"),
    [
        ("float32", 1, "all", True),
        ("float32", 2, "all", True),  # 64 rows of all heads: as many as stay near
        ("float32", 3, "all", False),
        ("float32", 1, "one", False),
        ("bfloat16", 1, "all", True),
        ("bfloat16", 2, "all", False),  # eight rows of a head, which product=bf16 multiplies by whole tiles
    ],
)
def test_few_rows_of_all_heads_go_in_strips(dtype: Dtype, q_len: int, heads_per_task: str, *, strips: bool) -> None:
    spec, arch = KernelSpec(op="verify_attention", heads=HEADS, dtype=dtype), epyc()
    plan = space.default_plan(spec, arch, "cpu").replace(heads_per_task=heads_per_task)
    size = Workload(batch=1, q_len=q_len, kv_len=4096)
    slow = dataclasses.replace(cpu.USUAL, near_bytes_ns=100.0)
    usual, slowed = (
        sum(term.microseconds for term in cpu.attention_terms(spec, size, plan, arch, constants))
        for constants in (cpu.USUAL, slow)
    )
    assert (slowed > usual) == strips


def test_strips_are_the_templates_own() -> None:
    spec = KernelSpec(op="verify_attention", heads=HEADS, dtype="bfloat16")
    plan = space.default_plan(spec, epyc(), "cpu")
    text = render(spec, plan, target_for(plan, epyc())).text
    assert f"NEAR_ROWS = ({cpu.NEAR_BYTES >> 10} << 10) / (DV_PADDED * (int)sizeof(float));" in text
    assert f"STRIP_KEYS = {cpu.STRIP_KEYS};" in text
    assert f"DIRECT_ROWS = {cpu.DIRECT_ROWS};" in text
    assert "return rows & 1 ? LANES : rows & 2 ? LANES / 2 : LANES / 4;" in text
