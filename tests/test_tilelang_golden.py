"""Rendered TileLang for Llama 3 8B as files a person can read; a change of a template shows here as a difference."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from specattn_codegen import space
from specattn_codegen.heads import HeadConfig
from specattn_codegen.plan import Setting
from specattn_codegen.processors import gpus
from specattn_codegen.render import render
from specattn_codegen.spec import KernelSpec, ScoreSpec

GOLDEN = Path(__file__).parent / "golden" / "tilelang"
HEADS = HeadConfig(num_q_heads=32, num_kv_heads=8, head_dim=128)


def _verify(score: ScoreSpec | None) -> KernelSpec:
    return KernelSpec(op="verify_attention", heads=HEADS, dtype="bfloat16", page_size=16, score=score)


def _mixed(score: ScoreSpec | None, heads: HeadConfig) -> KernelSpec:
    return KernelSpec(
        op="mixed_attention", heads=heads, dtype="bfloat16", page_size=16, score=score, selection="kv_head"
    )


CASES: dict[str, tuple[KernelSpec, dict[str, Setting]]] = {
    "verify_attention": (_verify(None), {}),
    "verify_attention_pillar": (_verify(ScoreSpec(rows="all", heads="kv_head")), {}),
    "verify_attention_vegas": (
        _verify(ScoreSpec(rows="ends", heads="layer")),
        {"split_keys": 2048, "ctas_per_sm": 1, "score_method": "dump"},
    ),
    "verify_attention_pages": (
        dataclasses.replace(_verify(ScoreSpec(granularity="page_max", histogram=True)), kv_dtype="float8_e4m3"),
        {},
    ),
    "verify_attention_reference": (
        dataclasses.replace(
            _verify(ScoreSpec(normaliser="reference")),
            heads=dataclasses.replace(HEADS, window=4096, softcap=50.0, sinks=True),
        ),
        {},
    ),
    "sparse_attention": (
        KernelSpec(op="sparse_attention", heads=HEADS, dtype="bfloat16", page_size=16, selection="kv_head"),
        {},
    ),
    "mixed_attention": (_mixed(None, HEADS), {}),
    "mixed_attention_pillar": (_mixed(ScoreSpec(), HEADS), {}),
    "mixed_attention_descriptors": (
        dataclasses.replace(_mixed(None, HEADS), page_size=64),
        {"kv_load": "descriptor", "num_stages": 2},
    ),
    "mixed_attention_reference": (
        _mixed(
            ScoreSpec(rows="ends", heads="layer", normaliser="reference"),
            dataclasses.replace(HEADS, window=4096, softcap=50.0, sinks=True),
        ),
        {},
    ),
    "select_kv": (KernelSpec(op="select_kv", heads=HEADS, selection="kv_head"), {}),
    "verify_attention_logits": (
        dataclasses.replace(
            _verify(ScoreSpec(rows="ends", value="logit")), heads=dataclasses.replace(HEADS, window=4096)
        ),
        {},
    ),
}


def rendered(name: str) -> str:
    spec, changes = CASES[name]
    return render(spec, space.default_plan(spec, gpus.find("h100"), "tilelang").replace(**changes), "tilelang").text


@pytest.mark.parametrize("name", CASES)
def test_rendered_text_is_the_golden_file(name: str, update_golden: bool) -> None:
    file = GOLDEN / f"{name}.py"
    if update_golden:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(rendered(name))
    assert rendered(name) == file.read_text(), "pytest --update-golden rewrites it; read the difference"


@pytest.mark.parametrize("name", CASES)
def test_rendered_text_is_tidy(name: str) -> None:
    text = rendered(name)
    assert max(map(len, text.splitlines())) <= 120
    assert not any(line != line.rstrip() for line in text.splitlines())
    assert "\n\n\n\n" not in text
    assert text.endswith("\n")
    assert not text.endswith("\n\n")
    assert "{{" not in text
    assert "{%" not in text
