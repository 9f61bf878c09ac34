"""Bundles: prepared, measured and taken home, with the CPU as the processor that is elsewhere."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from specattn_codegen import environment
from specattn_codegen.cli import tune as cli
from specattn_codegen.errors import SpecError
from specattn_codegen.heads import HeadConfig
from specattn_codegen.packs import pack
from specattn_codegen.packs.pack import Entry, Pack
from specattn_codegen.processors import cpu_info, gpus
from specattn_codegen.spec import KernelSpec, Workload
from specattn_codegen.tuning import bundle, record
from specattn_codegen.tuning.record import Record
from specattn_codegen.tuning.tune_session import Budget, Target, Task
from specattn_codegen.tuning.workforce import processes

HEADS = HeadConfig(num_q_heads=8, num_kv_heads=2, head_dim=32)
TASK = Task(
    spec=KernelSpec(op="select_kv", heads=HEADS, selection="kv_head"),
    workloads=(Workload(batch=1, q_len=3, kv_len=700, budget=50),),
)


class Silent:
    def __init__(self) -> None:
        self.trials: list[Record] = []

    def task_started(self, task: Task, trials: int) -> None: ...

    def trial_done(self, task: Task, trial: Record, best_us: float | None) -> None:  # noqa: ARG002
        self.trials.append(trial)

    def proving(self, task: Task, count: int) -> None: ...

    def task_done(self, task: Task, winners: Sequence[Entry]) -> None: ...


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPECATTN_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "bundle"


def cpu_target() -> Target:
    return Target(arch=cpu_info.detect(), backend="cpu", is_present=True, page_size=16)


def forgeries(mine: Pack, winner: Entry) -> list[Pack]:
    """A bundle's pack with what nobody asked for: another processor, a guess, another size."""
    elsewhere = dataclasses.replace(mine, arch=dataclasses.replace(mine.arch, num_sms=mine.arch.num_sms + 1))
    guess = dataclasses.replace(winner, chosen_by="modelled", proved_by="interpreter")
    other_size = dataclasses.replace(winner, workload=dataclasses.replace(winner.workload, kv_len=800))
    return [elsewhere, *(dataclasses.replace(mine, entries=(entry,)) for entry in (guess, other_size))]


def test_what_is_prepared_is_measured_and_comes_home(folder: Path, tmp_path: Path) -> None:
    target = cpu_target()
    made = bundle.prepare(folder, [TASK], target, count=2, seed=3)
    assert bundle.read(folder) == made
    (wanted,) = made.wanted
    assert {path.stem for path in (folder / bundle.SOURCES).iterdir()} == set(wanted.digests)
    with pytest.raises(SpecError, match="was not measured yet"):
        bundle.merge(folder, tmp_path / "packs")

    listener = Silent()
    budget = Budget(trials=2, seed=made.seed)
    (winner,) = bundle.measure(folder, listener, budget, processes)
    assert winner.chosen_by == "measured"
    assert tuple(trial.plan for trial in listener.trials) == wanted.plans
    assert len(record.read(folder / bundle.RECORDS)) == 2

    new, (path,) = bundle.merge(folder, tmp_path / "packs")
    assert new == 2
    assert bundle.merge(folder, tmp_path / "packs")[0] == 0
    found = pack.pack_path(folder / bundle.PACKS, target.arch, HEADS)
    for forged in forgeries(pack.load(found), winner):
        pack.write(found, forged)
        with pytest.raises(SpecError, match="is not what the bundle asked for"):
            bundle.merge(folder, tmp_path / "never")
    assert not (tmp_path / "never").exists()
    assert pack.load(path).entries[0].plan == winner.plan
    assert {trial.plan for trial in record.read(record.records_path(target.arch, HEADS))} == set(wanted.plans)


def test_another_processor_and_other_templates_are_refused(folder: Path) -> None:
    away = Target(arch=gpus.find("h100"), backend="triton", is_present=False, page_size=16)
    bundle.prepare(folder / "h100", [TASK], away, count=1, seed=0)
    with pytest.raises(SpecError, match=r"no NVIDIA or AMD GPU|the bundle is for h100"):
        bundle.measure(folder / "h100", Silent(), Budget(trials=1, seed=0), processes)
    bundle.prepare(folder / "cpu", [TASK], cpu_target(), count=1, seed=0)
    job = folder / "cpu" / bundle.JOB
    text = json.loads(job.read_text())
    text["wanted"][0]["digests"] = ["0" * 20]
    job.write_text(json.dumps(text))
    with pytest.raises(SpecError, match="renders to another source"):
        bundle.measure(folder / "cpu", Silent(), Budget(trials=1, seed=0), processes)
    with pytest.raises(SpecError, match="holds a bundle already"):
        bundle.prepare(folder / "cpu", [TASK], cpu_target(), count=1, seed=0)


@pytest.mark.parametrize("text", ["{", "[]", '{"schema_version": 9}', "[" * 100_000])
def test_what_is_no_bundle_is_one_clear_line(folder: Path, text: str) -> None:
    with pytest.raises(SpecError, match="no bundle"):
        bundle.read(folder)
    folder.mkdir()
    (folder / bundle.JOB).write_text(text)
    with pytest.raises(SpecError, match="not a bundle") as caught:
        bundle.read(folder)
    assert "\n" not in str(caught.value)


def test_the_three_commands_promote_what_was_modelled_and_a_killed_measurement_goes_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A bundle with the CPU as the processor that is elsewhere, by the commands themselves."""

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["specattn-tune", *arguments])
        with contextlib.suppress(SystemExit):
            cli.main()
        return capsys.readouterr().out

    assert "4 plans of 4 kernels" in run(
        "prepare", str(folder), "--heads", "8,2,32", "--gpu", "cpu", "--op", "select_kv", "--plans", "1"
    )
    (first, *_) = bundle.read(folder).wanted
    out, arch = tmp_path / "packs", cpu_info.detect()
    guess = Entry(
        spec=first.spec,
        workload=first.workload,
        plan=first.plans[0],
        chosen_by="modelled",
        proved_by="interpreter",
        latency_us=1.0,
        noise_us=0.0,
        share_of_ceiling=1.0,
        resources=(),
        source_digest=first.digests[0],
        environment=environment.current("cpu", None),
    )
    pack.publish(out, arch, HEADS, [guess])

    command = [sys.executable, "-c", "from specattn_codegen.cli.tune import main; main()", "measure", str(folder)]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONUNBUFFERED": "1"}
    killed = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=variables)
    assert killed.stdout is not None
    assert killed.stdout.readline().startswith("[1/4]")
    killed.kill()
    killed.communicate()
    before = record.read(folder / bundle.RECORDS)
    assert before
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=variables)
    assert "specattn-tune merge" in done.stdout
    after = record.read(folder / bundle.RECORDS)
    assert after[: len(before)] == before
    assert len({trial.identity for trial in after}) == len(after) == 4

    assert "4 new trials recorded" in run("merge", str(folder), "--out", str(out))
    entries = pack.load(pack.pack_path(out, arch, HEADS)).entries
    assert len(entries) == 4
    assert {entry.chosen_by for entry in entries} == {"measured"}
