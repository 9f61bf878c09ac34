"""specattn-bench dispatch: fresh processes are timed, and the answer says what was asked of each step."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from specattn_bench import cli


def test_every_step_is_timed_in_a_fresh_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "dispatch.json"
    monkeypatch.setattr(sys, "argv", ["specattn-bench", "dispatch", "--processes", "1", "--json", str(path)])
    cli.main()
    shown = capsys.readouterr().out
    answers = {one["step"]: one for one in json.loads(path.read_text())["answers"]}
    assert list(answers) == ["import", "load", "first", "hit"]
    for step, answer in answers.items():
        assert 0 < answer["wall_least_us"] <= answer["wall_us"]
        assert step in shown
    assert {step: answer["limit_us"] for step, answer in answers.items()} == {
        "import": 300e3,
        "load": None,
        "first": 20.0,
        "hit": 2.0,
    }
    assert answers["hit"]["cpu_us"] < answers["load"]["wall_us"]  # reading packs is what a hit does not do again
