"""Packs that ship: readable, complete, and made of the text that today's templates give."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from specattn_codegen import models, paths, space
from specattn_codegen.build import target_for
from specattn_codegen.cli.tune_all_models import heads_by_use
from specattn_codegen.environment import silicon
from specattn_codegen.packs import pack
from specattn_codegen.packs.pack import Entry, Pack
from specattn_codegen.packs.staleness import space_digest
from specattn_codegen.processors.silicon import arch_of
from specattn_codegen.render import render
from specattn_codegen.workloads import TUNED_OPS, default_workloads, model_specs

SHIPPED = sorted(paths.shipped_packs_dir().rglob("*.json"))
LARGEST_BYTES = 25 * 10**6  # of all together, as a checkout carries them; a wheel packs them twentyfold
SAMPLED = 100  # entries, the same ones in every run; a pack has some 48


@pytest.fixture(scope="module")
def shipped() -> dict[Path, Pack]:
    return {file: pack.load(file) for file in SHIPPED}


def test_there_are_some_and_they_stay_small() -> None:
    assert SHIPPED
    assert sum(file.stat().st_size for file in SHIPPED) < LARGEST_BYTES


def test_every_pack_is_named_after_what_it_holds_for_heads_of_the_registry(shipped: dict[Path, Pack]) -> None:
    registered = set(heads_by_use(models.names()))
    for file, found in shipped.items():
        assert (found.arch.name, found.heads.name) == (file.parent.name, file.stem)
        assert found.arch == silicon(arch_of(found.arch))
        assert found.heads in registered


def test_no_pack_lacks_a_kernel_or_a_size(shipped: dict[Path, Pack]) -> None:
    for found in shipped.values():
        arch = arch_of(found.arch)
        dtype, page_size = ("bfloat16", 16) if arch.is_gpu else ("float32", 0)
        specs = model_specs(found.heads, dtype=dtype, page_size=page_size, ops=TUNED_OPS)
        wanted = {pack.slot(spec, workload) for spec in specs for workload in default_workloads(spec, arch)}
        assert wanted <= {pack.slot(entry.spec, entry.workload) for entry in found.entries}


def test_entries_say_what_stands_for_them(shipped: dict[Path, Pack]) -> None:
    for found in shipped.values():
        for entry in found.entries:
            assert entry.chosen_by == ("modelled" if found.arch.vendor != "cpu" else "measured")
            assert all(kernel.registers > 0 for kernel in entry.resources)
            assert 0.0 < entry.share_of_ceiling <= 1.0


def test_a_sample_of_entries_is_what_their_plans_render_to_today(shipped: dict[Path, Pack]) -> None:
    everything: list[tuple[Pack, Entry]] = [(found, entry) for found in shipped.values() for entry in found.entries]
    for found, entry in random.Random(0).sample(everything, min(SAMPLED, len(everything))):
        arch = arch_of(found.arch)
        assert space.why_invalid(entry.plan, entry.spec, arch) is None
        assert entry.source_digest == render(entry.spec, entry.plan, target_for(entry.plan, arch)).digest
        assert entry.space_digest == space_digest(entry.spec, entry.plan.backend)
