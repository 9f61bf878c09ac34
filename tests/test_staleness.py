"""Grades of an entry: each thing that may change since it was tuned costs it what it should."""

from __future__ import annotations

import dataclasses
import json

import pytest

from pack_cases import ARCH, SCORED, SELECT, VERIFY, entry
from specattn_codegen.packs.pack import Entry
from specattn_codegen.packs.staleness import grade, space_digest, why_unusable


def compiled_by(compiler: str) -> Entry:
    fresh = entry()
    return dataclasses.replace(fresh, environment=dataclasses.replace(fresh.environment, compiler=compiler))


CASES = {
    "exact": entry(),
    "exact, space never noted": dataclasses.replace(entry(SCORED), space_digest=""),
    "compatible": compiled_by("triton 3.6.0"),
    "stale, another compiler": compiled_by("tilelang 0.1.15"),
    "stale, no compiler noted": compiled_by(""),
    "stale, other options": compiled_by("triton 3.7.1, options 0123abcd"),
    "stale, another text": dataclasses.replace(entry(), source_digest="0" * 20),
    "stale, another space": dataclasses.replace(entry(SELECT), space_digest="0" * 20),
    "invalid, no such choice": dataclasses.replace(entry(), plan=entry().plan.replace(block_n=48)),
    "invalid, not understood": dataclasses.replace(entry(), unknown=json.dumps({"spec": {"tree_mask": True}})),
}


@pytest.mark.parametrize("name", CASES)
def test_grades(name: str) -> None:
    assert grade(CASES[name], ARCH) == name.partition(",")[0]
    assert (why_unusable(CASES[name], ARCH) is not None) == name.startswith("invalid")


def test_a_space_is_known_by_its_axes() -> None:
    assert space_digest(VERIFY, "triton") != space_digest(SCORED, "triton")
    assert space_digest(VERIFY, "triton") == space_digest(dataclasses.replace(VERIFY, page_size=64), "triton")
