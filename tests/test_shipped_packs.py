"""Packs that ship: readable, complete, and made of the text that today's templates give."""

from __future__ import annotations

from pathlib import Path

import pytest

from specattn_codegen import gpus, pack, paths, space
from specattn_codegen.build import target_for
from specattn_codegen.render import render

SHIPPED = sorted(paths.shipped_packs_dir().rglob("*.json"))


def test_there_are_some() -> None:
    assert SHIPPED


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_entries_are_what_their_plans_render_to_today(file: Path) -> None:
    entries = pack.load(file).entries
    arch = gpus.find(file.parent.name)
    assert {entry.spec.heads.name for entry in entries} == {file.stem}
    for entry in entries:
        assert space.why_invalid(entry.plan, entry.spec, arch) is None
        assert entry.source_digest == render(entry.spec, entry.plan, target_for(entry.plan, arch)).digest
        assert entry.proved_by != "none"
        assert entry.chosen_by == "modelled"
        assert all(kernel.registers > 0 for kernel in entry.resources)
        assert 0.0 < entry.share_of_ceiling <= 1.0
