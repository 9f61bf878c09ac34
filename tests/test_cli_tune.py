"""specattn-tune as people run it: real processes, bad input, Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from specattn_codegen import models
from specattn_codegen.cli import tune as cli
from specattn_codegen.packs import pack
from specattn_codegen.processors import gpus

TINY = ("--heads", "8,2,32", "--gpu", "cpu")
COMMAND = (sys.executable, "-c", "from specattn_codegen.cli.tune import main; main()")


def run_here(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int | str | None:
    """The command in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", ["specattn-tune", *arguments])
    try:
        cli.main()
    except SystemExit as stop:
        return stop.code
    return 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--model", "lama3-8b", "--gpu", "h100"], "llama3-8b"),
        (["--heads", "32,8,128", "--gpu", "h10"], "h100"),
        (["--heads", "32,8", "--gpu", "h100"], "as in 32,8,128"),
        (["--heads", "32,5,128", "--gpu", "h100"], "query heads must be a multiple"),
        (["--heads", "32,8,128", "--gpu", "h100", "--tp", "3"], "use one of 1, 2, 4"),
        (["--heads", "32,8,128", "--gpu", "h100", "--page-size", "0"], "'--page-size': 0"),
        (["--heads", "32,8,128", "--gpu", "h100", "--trials", "0"], "'--trials': 0"),
        (["--heads", "32,8,128", "--gpu", "h100", "--timeout", "0"], "'--timeout': 0"),
        (["--heads", "32,8,128", "--gpu", "h100", "--seed", "-1"], "'--seed': -1"),
        (["--heads", "32,8,128", "--gpu", "h100", "--backend", "cpu"], "use triton"),
        (["--heads", "32,8,128", "--gpu", "h100", "--dtype", "int8"], "bfloat16"),
        (["--heads", "32,8,128", "--gpu", "h100", "--op", "flash"], "verify_attention"),
        (["--gpu", "h100"], "exactly one of --model and --heads"),
        (["--model", "llama3-8b", "--heads", "32,8,128", "--gpu", "h100"], "exactly one of --model and --heads"),
        (["--model", "llama3-8b", "--gpu", "h100", "--out", "/proc/nowhere"], "/proc/nowhere: cannot be written"),
        (["--model", "llama3-8b", "--gpu", "h100", "--out", __file__], "cannot be written"),
    ],
)
def test_bad_input_is_one_clear_line_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], says: str
) -> None:
    arguments = arguments if "--out" in arguments else [*arguments, "--out", str(tmp_path)]
    assert run_here(monkeypatch, *arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1
    assert says in shown.err


def test_a_damaged_pack_stops_a_run_before_it_starts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "h100" / "q32-kv8-d128.json"
    path.parent.mkdir()
    path.write_text("{")
    assert run_here(monkeypatch, "--model", "llama3-8b", "--gpu", "h100", "--out", str(tmp_path)) == 2
    shown = capsys.readouterr()
    assert str(path) in shown.err
    assert shown.err.count("\n") == 1
    assert path.read_text() == "{"


def test_lists(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_here(monkeypatch, "--list-models") == 0
    assert tuple(capsys.readouterr().out.split()) == models.names()
    assert run_here(monkeypatch, "--list-gpus") == 0
    assert capsys.readouterr().out.split() == [*gpus.names(), "cpu"]


def test_help_has_examples_that_name_real_options(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_here(monkeypatch, "--help") == 0
    shown = capsys.readouterr().out
    examples = [line.split("  ")[1] for line in shown.splitlines() if line.strip().startswith("specattn-tune --")]
    assert len(examples) >= 4
    known = {option for parameter in cli.command.params for option in parameter.opts}
    assert {word for line in examples for word in line.split() if word.startswith("--")} <= known


def start(out: Path, *arguments: str, **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*COMMAND, *TINY, "--out", str(out), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONUNBUFFERED": "1", **variables},
        # What is started in the background ignores it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
    )


def descendants(pid: int) -> list[int]:
    """Process ids of everything a process started, its own sessions included."""
    found: list[int] = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
        if parent == pid:
            found += [int(folder.name), *descendants(int(folder.name))]
    return found


def test_a_run_ends_with_a_table_and_a_pack_without_control_codes(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    process = start(tmp_path, "--op", "select_kv", "--trials", "1", "--report", str(page))
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")
    assert "\x1b" not in out
    path = tmp_path / "cpu" / "q8-kv2-d32.json"
    assert f"pack: {path}" in out
    assert f"report: {page}" in out
    entries = pack.load(path).entries
    assert len(entries) == 4
    shown = page.read_text()
    for entry in entries:
        (row,) = [
            line for line in out.splitlines() if f"{entry.spec.name} " in line and f" {entry.workload.name} " in line
        ]
        assert "measured" in row
        assert f"{entry.share_of_ceiling:.0%}" in row
        assert f"<td>{entry.spec.name}</td><td>{entry.workload.name}</td>" in shown


@pytest.mark.parametrize("when", ["while a candidate runs", "after the first winner"])
def test_ctrl_c_keeps_the_best_and_leaves_nothing_running(tmp_path: Path, when: str) -> None:
    process = start(tmp_path, "--op", "verify_attention", "--trials", "2")
    assert process.stdout is not None
    first = process.stdout.readline()
    assert first.startswith("q8-kv2-d32 on cpu (measured here)")
    if when == "after the first winner":
        assert process.stdout.readline().startswith("[1/")
    while not (workers := descendants(process.pid)):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.strip() == "interrupted"
    assert not [pid for pid in workers if Path(f"/proc/{pid}").exists()]
    path = tmp_path / "cpu" / "q8-kv2-d32.json"
    if when == "after the first winner":
        assert f"pack: {path}" in out
        assert len(pack.load(path).entries) >= 1
    elif path.exists():
        assert json.loads(path.read_text())["entries"]
    assert list(tmp_path.rglob(".*")) == []


def test_an_unwritable_cache_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("SPECATTN_CACHE_DIR", "/proc/nowhere")
    assert run_here(monkeypatch, "--heads", "8,2,32", "--gpu", "h100", "--out", str(tmp_path)) == 2
    shown = capsys.readouterr()
    assert shown.err.count("\n") == 1
    assert "SPECATTN_CACHE_DIR /proc/nowhere: cannot be written" in shown.err


def test_no_compiler_is_one_line(tmp_path: Path) -> None:
    process = start(tmp_path, SPECATTN_CACHE_DIR=str(tmp_path / "cache"), PATH="/nowhere", CXX="")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert out == ""
    assert err.count("\n") == 1
    assert "no C++ compiler" in err
