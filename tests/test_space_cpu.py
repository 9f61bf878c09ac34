"""The CPU's space: defaults are valid everywhere, every feasible plan renders, every rule speaks."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import pytest

from specattn_codegen import space
from specattn_codegen.heads import HeadConfig
from specattn_codegen.plan import Plan
from specattn_codegen.processors import cpu_info
from specattn_codegen.processors.arch import Arch
from specattn_codegen.render import render
from specattn_codegen.spec import DTYPES, KernelSpec, ScoreSpec

HEADS = HeadConfig(num_q_heads=6, num_kv_heads=2, head_dim=80, softcap=2.0, window=9, sinks=True)
SPECS = [
    *(KernelSpec(op="verify_attention", heads=HEADS, dtype=dtype, score=ScoreSpec(rows="ends")) for dtype in DTYPES),
    *(KernelSpec(op="sparse_attention", heads=HEADS, dtype=dtype, selection="layer") for dtype in DTYPES),
    KernelSpec(op="select_kv", heads=HEADS, selection="kv_head"),
]


def arch(target: str) -> Arch:
    return dataclasses.replace(cpu_info.detect(measure=False), target=target)


@pytest.mark.parametrize("target", cpu_info.NEEDS)
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_defaults_are_valid_and_every_plan_renders(spec: KernelSpec, target: str) -> None:
    here = arch(target)
    assert space.why_invalid(space.default_plan(spec, here, "cpu"), spec, here) is None
    plans = list(space.feasible(spec, here, "cpu"))
    assert len(plans) == len(set(plans)) > 1
    for plan in itertools.islice(plans, 0, None, 17):
        text = render(spec, plan, target).text
        assert render(spec, plan, target).text == text
        assert "{{" not in text


def test_every_rule_says_why() -> None:
    spec, here = SPECS[2], arch("avx512")  # bfloat16 verification with scores
    plan = space.default_plan(spec, here, "cpu")
    broken = {
        "needs amx-bf16": plan.replace(product="amx", score_dump="bfloat16"),
        "not one of": plan.replace(key_tile=40),
        "others in bfloat16": plan.replace(score_dump="bfloat16"),
        "keeps no weights": plan.replace(score_method="remat", score_dump="float32"),
        "this space has": Plan.of("cpu", key_tile=32),
        "does not run on cpu": Plan.of("triton", block_n=32),
    }
    for words, bad in broken.items():
        assert words in (space.why_invalid(bad, spec, here) or "")


def test_rates_are_measured_once_and_a_damaged_file_is_measured_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    monkeypatch.setenv("SPECATTN_CACHE_DIR", str(tmp_path))
    calls: list[str] = []

    def measured(target: str, threads: int, cache_bytes: int) -> dict[str, float]:
        calls.append(f"{target} {threads} {cache_bytes}")
        return {"bandwidth_gbs": 12.5, "fp32_tflops": 0.25, "bf16_tflops": 0.5}

    monkeypatch.setattr(cpu_info, "measure_rates", measured)
    for _ in range(2):
        cpu_info.detect.cache_clear()
        assert cpu_info.detect().bandwidth_gbs == 12.5
    assert len(calls) == 1
    (file,) = (cpu_info.paths.cache_dir() / "machine").iterdir()
    for damage in ("", "{", json.dumps({"bandwidth_gbs": -1, "fp32_tflops": 1}), json.dumps([1])):
        file.write_text(damage)
        cpu_info.detect.cache_clear()
        assert cpu_info.detect().fp32_tflops == 0.25
    assert len(calls) == 5
    monkeypatch.setattr(
        cpu_info, "measure_rates", lambda *_: {"bandwidth_gbs": 20.0, "fp32_tflops": 0.125, "bf16_tflops": 0.25}
    )
    best = cpu_info.detect(refresh=True)
    assert (best.bandwidth_gbs, best.fp32_tflops) == (20.0, 0.25)  # ceilings: the best of every measurement
    cpu_info.detect.cache_clear()


def test_last_level_caches_of_all_cores_count_once_each(tmp_path: Path) -> None:
    for core, sharers in ((0, "0-1"), (1, "0-1"), (2, "2-3"), (3, "2-3")):
        for level, size, shared in ((1, "48K", f"{core}"), (2, "2048K", f"{core}"), (3, "32M", sharers)):
            index = tmp_path / f"cpu{core}" / "cache" / f"index{level}"
            index.mkdir(parents=True)
            (index / "level").write_text(f"{level}\n")
            (index / "size").write_text(f"{size}\n")
            (index / "shared_cpu_list").write_text(f"{shared}\n")
    assert cpu_info.last_level_cache(tmp_path) == 64 << 20
    assert cpu_info.last_level_cache(tmp_path / "nothing") == cpu_info.DEFAULT_LAST_LEVEL_CACHE


def test_the_probe_measures_something_plausible() -> None:
    rates = cpu_info.measure_rates(cpu_info.instruction_set(), 1, 1 << 20)
    assert 0.5 < rates["bandwidth_gbs"] < 2000
    assert 0.001 < rates["fp32_tflops"] < 20
    assert 0.001 < rates["bf16_tflops"] < 200
