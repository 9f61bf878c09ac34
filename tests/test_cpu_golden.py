"""Rendered C++ for Llama 3 8B as files a person can read; a change of a template shows here as a difference."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from specattn_codegen import space
from specattn_codegen.heads import HeadConfig
from specattn_codegen.processors import cpu_info
from specattn_codegen.render import render
from specattn_codegen.spec import KernelSpec, ScoreSpec

GOLDEN = Path(__file__).parent / "golden" / "cpu"
HEADS = HeadConfig(num_q_heads=32, num_kv_heads=8, head_dim=128)
PILLAR, VEGAS = ScoreSpec(rows="all", heads="kv_head"), ScoreSpec(rows="ends", heads="layer")

CASES: dict[str, tuple[KernelSpec, str]] = {
    "verify_attention_pillar_avx512": (KernelSpec(op="verify_attention", heads=HEADS, score=PILLAR), "avx512"),
    "verify_attention_vegas_amx": (
        KernelSpec(op="verify_attention", heads=HEADS, dtype="bfloat16", score=VEGAS),
        "amx-bf16",
    ),
    "verify_attention_reference_avx512_bf16": (
        KernelSpec(
            op="verify_attention",
            heads=HEADS,
            dtype="bfloat16",
            score=ScoreSpec(normaliser="reference", histogram=True),
        ),
        "avx512-bf16",
    ),
    "sparse_attention_avx2": (
        KernelSpec(op="sparse_attention", heads=HEADS, dtype="float16", selection="kv_head"),
        "avx2",
    ),
    "select_kv_avx512": (KernelSpec(op="select_kv", heads=HEADS, selection="kv_head"), "avx512"),
}


def rendered(name: str) -> str:
    spec, target = CASES[name]
    arch = dataclasses.replace(cpu_info.detect(measure=False), target=target, num_sms=4)
    return render(spec, space.default_plan(spec, arch, "cpu"), target).text


@pytest.mark.parametrize("name", CASES)
def test_rendered_text_is_the_golden_file(name: str, update_golden: bool) -> None:
    file = GOLDEN / f"{name}.cpp"
    if update_golden:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(rendered(name))
    assert rendered(name) == file.read_text(), "pytest --update-golden rewrites it; read the difference"


@pytest.mark.parametrize("name", CASES)
def test_rendered_text_is_tidy(name: str) -> None:
    text = rendered(name)
    assert max(map(len, text.splitlines())) <= 120
    assert not any(line != line.rstrip() for line in text.splitlines())
    assert "\n\n\n" not in text
    assert text.endswith("}\n")
    assert "{{" not in text
    assert "{%" not in text
