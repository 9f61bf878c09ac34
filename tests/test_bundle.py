"""Bundles: prepared, measured and taken home, with the CPU as the processor that is elsewhere."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from specattn_codegen import bundle, cpu_info, gpus, pack, record
from specattn_codegen.errors import SpecError
from specattn_codegen.heads import HeadConfig
from specattn_codegen.pack import Entry
from specattn_codegen.record import Record
from specattn_codegen.spec import KernelSpec, Workload
from specattn_codegen.tune_session import Budget, Target, Task
from specattn_codegen.workforce import processes

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
    assert pack.load(path).entries[0].plan == winner.plan
    assert {trial.plan for trial in record.read(record.records_path(target.arch, HEADS))} == set(wanted.plans)
    assert bundle.merge(folder, tmp_path / "packs")[0] == 0


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
