"""Presets are found by name, and names that are not presets yet get a useful answer."""

from __future__ import annotations

import dataclasses

import pytest

from specattn_codegen import ScoreSpec, SpecError, TopK
from specattn_runtime.decoding.decode_spec import DecodeSpec
from specattn_runtime.decoding.presets import PRESETS, preset_named


def test_the_published_scores() -> None:
    assert preset_named("vegas").score == ScoreSpec(rows="ends", heads="layer")
    assert preset_named("pillar").score == ScoreSpec(rows="all", heads="kv_head")
    assert preset_named("reference").score == ScoreSpec(rows="all", heads="kv_head", normaliser="reference")
    assert [name for name, preset in PRESETS.items() if preset.uses_references] == ["reference"]
    assert preset_named("streaming").score is None
    assert preset_named("streaming").sink > 0
    assert [name for name, preset in PRESETS.items() if not preset.drafts] == ["dense"]
    assert all(preset.name == name for name, preset in PRESETS.items())


@pytest.mark.parametrize("name", ["draft-guided", "nsa-verify"])
def test_planned_presets_are_refused_as_planned(name: str) -> None:
    with pytest.raises(
        SpecError, match=f"'{name}': planned, not available yet; available: vegas, pillar, reference, hybrid"
    ):
        preset_named(name)


@pytest.mark.parametrize(("name", "nearest"), [("vegs", "vegas"), ("pilar", "pillar"), ("stream", "streaming")])
def test_a_misspelt_preset_gets_the_nearest_name(name: str, nearest: str) -> None:
    with pytest.raises(SpecError, match=f"did you mean {nearest}\\?"):
        preset_named(name)


def test_a_wild_name_gets_the_list() -> None:
    with pytest.raises(SpecError, match="'zzz': unknown; available: vegas"):
        preset_named("zzz")


def test_a_preset_refuses_negative_keys() -> None:
    with pytest.raises(SpecError, match="sink=-1"):
        dataclasses.replace(preset_named("vegas"), sink=-1)


def test_the_policy_is_the_budget_with_the_presets_minimum() -> None:
    assert DecodeSpec(preset=preset_named("vegas"), budget=0.07).policy == TopK(ratio=0.07, min=256)


def test_without_drafts_only_the_drafts_go() -> None:
    spec = DecodeSpec(preset=preset_named("pillar"), draft_len=3, page_size=7)
    dense = spec.without_drafts()
    assert not dense.preset.drafts
    assert (dense.preset.score, dense.draft_len, dense.page_size) == (spec.preset.score, 3, 7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"draft_len": 0}, "draft_len=0: must be at least 1; to decode without drafts use preset dense"),
        ({"budget": 0.0}, "budget=0.0: must be above 0 and at most 1"),
        ({"budget": 1.01}, "budget=1.01"),
        ({"budget": float("nan")}, "budget=nan"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"page_size": 0}, "page_size=0"),
    ],
)
def test_bad_decode_specs(changes: dict[str, float], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        dataclasses.replace(DecodeSpec(preset=preset_named("vegas")), **changes)
