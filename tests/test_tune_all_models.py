"""specattn-tune all-models: what is made, in which order, and what a second run leaves as it is."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from imagined import Imagined
from specattn_codegen import models, pack
from specattn_codegen.cli import tune as cli
from specattn_codegen.cli import tune_all_models
from specattn_codegen.heads import HeadConfig, layer_heads

MODEL = "phi3-mini-4k"  # one kind of layer, with a window, hence one search
(HEADS,) = layer_heads(MODEL).values()
Run = Callable[..., str]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.setenv("SPECATTN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(tune_all_models, "lasting", lambda _: contextlib.nullcontext(Imagined()))

    def call(*arguments: str) -> str:
        chosen = ["all-models", "--model", MODEL, "--gpu", "h100", "--gpu", "mi300x", "--out", str(tmp_path / "out")]
        monkeypatch.setattr(sys, "argv", ["specattn-tune", *chosen, *arguments])
        cli.main()
        return capsys.readouterr().out

    return call


def test_heads_that_most_models_share_come_first_and_all_are_there() -> None:
    order = tune_all_models.heads_by_use(models.names())
    assert order[:2] == [
        HeadConfig(num_q_heads=32, num_kv_heads=8, head_dim=128),
        HeadConfig(num_q_heads=64, num_kv_heads=8, head_dim=128),
    ]
    assert len(order) == len(set(order))
    assert set(order) == {heads for name in models.names() for heads in layer_heads(name).values()}


def test_a_second_run_makes_what_is_missing_or_stale_and_nothing_else(run: Run, tmp_path: Path) -> None:
    assert "2 searches are left" in run("--timeout", "1e-9")
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").rglob("*.json"))
    out = run()
    assert out.splitlines()[0] == "0 of 2 packs are complete"
    assert f"24 entries in {tmp_path / 'out'}" in out
    files = [tmp_path / "out" / gpu / f"{HEADS.name}.json" for gpu in ("h100", "mi300x")]
    before = [file.stat().st_mtime_ns for file in files]
    assert run().splitlines()[:2] == ["2 of 2 packs are complete", f"0 entries in {tmp_path / 'out'}"]
    assert [file.stat().st_mtime_ns for file in files] == before

    found = pack.load(files[1])
    entries = (dataclasses.replace(found.entries[0], source_digest="0" * 20), *found.entries[1:])
    pack.write(files[1], dataclasses.replace(found, entries=entries))
    stale = files[1].stat().st_mtime_ns
    assert run("--dry-run").splitlines() == ["1 of 2 packs are complete", f"mi300x/{HEADS.name}: 1 searches to do"]
    assert files[1].stat().st_mtime_ns == stale
    run()
    assert pack.load(files[1]) == found
    assert files[0].stat().st_mtime_ns == before[0]
