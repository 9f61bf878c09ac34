"""load_kernels and its packs: layers, what is warned about and once, strictness, frozen processes, and the digest."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from specattn_codegen import HeadConfig, ScoreSpec, SpecError, build, space
from specattn_codegen.build import target_for
from specattn_codegen.environment import current
from specattn_codegen.packs import pack
from specattn_codegen.packs.pack import Entry
from specattn_codegen.packs.staleness import space_digest
from specattn_codegen.plan import Plan
from specattn_codegen.processors import cpu_info
from specattn_codegen.processors.arch import Arch
from specattn_codegen.render import render
from specattn_codegen.spec import KernelSpec, Workload
from specattn_runtime import Kernels, load_kernels

HEADS = HeadConfig(num_q_heads=8, num_kv_heads=2, head_dim=32)
VERIFY = KernelSpec(op="verify_attention", heads=HEADS)
HERE = cpu_info.detect(measure=False)


@pytest.fixture(autouse=True)
def no_compiler_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(build, "load", Mock())
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


def plans() -> tuple[Plan, Plan]:
    """The default and another."""
    default = space.default_plan(VERIFY, HERE, "cpu")
    return default, next(plan for plan in space.feasible(VERIFY, HERE, "cpu") if plan != default)


def published(root: Path, plan: Plan, arch: Arch = HERE, **changes: str) -> Path:
    entry = Entry(
        spec=VERIFY,
        workload=Workload(batch=1, q_len=4, kv_len=4096),
        plan=plan,
        chosen_by="measured",
        proved_by="device",
        latency_us=9.0,
        noise_us=0.1,
        share_of_ceiling=0.5,
        resources=(),
        source_digest=render(VERIFY, plan, target_for(plan, arch)).digest,
        environment=current("cpu", "a CPU"),
        space_digest=space_digest(VERIFY, "cpu"),
    )
    return pack.publish(root, arch, HEADS, [dataclasses.replace(entry, **changes)])


def rung_of(kernels: Kernels, *, q_len: int = 4, kv_len: int = 4096, score: ScoreSpec | None = None) -> str:
    kernels.prepare(*filter(None, [score]), max_q=q_len, max_kv=kv_len)
    return next(rung for (spec, _), rung in kernels.rungs.items() if spec.score == score)


def test_packs_that_are_named_go_before_those_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    default, other = plans()
    named = published(tmp_path / "named", other)
    published(tmp_path / "environment", default)
    monkeypatch.setenv("SPECATTN_CONFIG_DIR", str(tmp_path / "environment"))
    chosen = {
        "file": load_kernels(HEADS, packs=named),
        "folder": load_kernels(HEADS, packs=[tmp_path / "named"]),
        "environment": load_kernels(HEADS),
    }
    found = {
        name: kernels.packs.find(VERIFY, Workload(batch=1, q_len=4, kv_len=4096)) for name, kernels in chosen.items()
    }
    assert {name: one.plan for name, one in found.items()} == {"file": other, "folder": other, "environment": default}
    assert [rung_of(kernels) for kernels in chosen.values()] == ["exact"] * 3
    assert caplog.records == []
    with pytest.raises(SpecError, match="no such folder or file"):
        load_kernels(HEADS, packs=tmp_path / "nowhere")


@pytest.mark.parametrize("change", [{"num_sms": HERE.num_sms + 1}, {"cpu_model": "another maker's 6 143"}])
def test_a_siblings_entry_is_warned_about_once_and_counts_as_tuned(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, change: dict[str, Any]
) -> None:
    """Another processor of the same instruction set: of another size, or of another model, whose cores differ."""
    _, other = plans()
    path = published(tmp_path, other, dataclasses.replace(HERE, **change))
    with caplog.at_level(logging.WARNING, logger="specattn"):
        kernels = load_kernels(HEADS, packs=tmp_path, strict=True)
        assert rung_of(kernels) == "sibling"
        kernels.prepare(max_q=8, max_kv=4096)
    assert len(caplog.records) == 1
    assert str(path) in caplog.text
    assert "specattn-tune --heads 8,2,32 --gpu cpu" in caplog.text
    with pytest.raises(SpecError, match="no tuned entry"):
        kernels.prepare(ScoreSpec())


def test_a_stale_entry_serves_with_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, other = plans()
    published(tmp_path, other, source_digest="0" * 20)
    with caplog.at_level(logging.WARNING, logger="specattn"):
        kernels = load_kernels(HEADS, packs=tmp_path)
        assert rung_of(kernels) == "exact"
        kernels.prepare(max_q=4, max_kv=8192)
    assert len(caplog.records) == 1
    assert "was tuned before today's templates" in caplog.text


@pytest.mark.parametrize("how", ["argument", "environment"])
def test_a_frozen_process_keeps_its_plans_and_its_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    default, other = plans()
    published(tmp_path, default)
    if how == "environment":
        monkeypatch.setenv("SPECATTN_FROZEN", "1")
    frozen = how == "argument"
    first = load_kernels(HEADS, packs=tmp_path, frozen=frozen)
    published(tmp_path, other)
    again = load_kernels(HEADS, packs=tmp_path, frozen=frozen)
    monkeypatch.delenv("SPECATTN_FROZEN", raising=False)
    thawed = load_kernels(HEADS, packs=tmp_path)
    assert first.digest == again.digest != thawed.digest
    assert load_kernels(HEADS, packs=tmp_path, batch_invariant=True).digest != thawed.digest


def test_a_mixed_batch_takes_the_plan_of_its_verification(tmp_path: Path) -> None:
    _, other = plans()
    published(tmp_path, other)
    mixed = dataclasses.replace(VERIFY, op="mixed_attention", selection="kv_head")
    found = load_kernels(HEADS, packs=tmp_path).packs.find(mixed, Workload(batch=1, q_len=4, kv_len=4096, budget=64))
    assert (found.rung, found.plan) == ("exact", other)


def test_the_environment_may_insist_on_tuned_entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECATTN_STRICT", "1")
    _, other = plans()
    published(tmp_path, other)
    kernels = load_kernels(HEADS, packs=tmp_path)
    assert rung_of(kernels) == "exact"
    with pytest.raises(SpecError, match="no tuned entry"):
        kernels.prepare(ScoreSpec())
    monkeypatch.setenv("SPECATTN_STRICT", "0")
    load_kernels(HEADS, packs=tmp_path).prepare(ScoreSpec())
