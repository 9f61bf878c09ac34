"""specattn-tune all-models: what is made, in which order, and what a second run leaves as it is."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from imagined import Imagined, imagined_fit
from specattn_codegen import models, space
from specattn_codegen.cli import tune as cli
from specattn_codegen.cli import tune_all_models
from specattn_codegen.environment import fit_digest
from specattn_codegen.heads import HeadConfig, layer_heads
from specattn_codegen.packs import pack
from specattn_codegen.processors import cpu_info, gpus
from specattn_codegen.spec import Workload
from specattn_codegen.tuning import model_fit
from specattn_codegen.tuning.jobs import MeasureJob
from specattn_codegen.tuning.measure import summary
from specattn_codegen.tuning.outcome import Outcome, Status
from specattn_codegen.tuning.record import Stage
from specattn_codegen.tuning.workforce import TuningJob

MODEL = "phi3-mini-4k"  # one kind of layer, with a window, hence one search
(HEADS,) = layer_heads(MODEL).values()
Run = Callable[..., str]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.setenv("SPECATTN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
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


def test_a_fit_of_the_cost_model_is_announced_and_named_in_every_entry(run: Run, tmp_path: Path) -> None:
    h100 = gpus.find("h100")
    model_fit.write(model_fit.user_path(h100), imagined_fit(h100, {"memory": 1.5}))
    fit = fit_digest(model_fit.fitted(h100))
    assert f"cost model: fitted to measurements on h100 (fit {fit}: memory x 1.5)" in run()
    fitted, as_it_is = (pack.load(tmp_path / "out" / gpu / f"{HEADS.name}.json") for gpu in ("h100", "mi300x"))
    assert fitted.provenance["fit"] == {fit: len(fitted.entries)}
    assert all(entry.environment.fit == "" for entry in as_it_is.entries)


@dataclass
class Clocked:
    """A CPU on which the default plan takes 100 us and every other plan `others_us`, and proofs succeed."""

    others_us: float
    candidates: Counter[Workload] = field(default_factory=Counter[Workload])

    def __call__(self, stage: Stage) -> AbstractContextManager[Clocked]:  # noqa: ARG002
        return contextlib.nullcontext(self)

    def start(self, jobs: Sequence[TuningJob]) -> None:
        """Builds take no time."""

    def run(self, jobs: Iterable[TuningJob]) -> Iterator[tuple[TuningJob, Outcome]]:
        for job in jobs:
            assert isinstance(job, MeasureJob)
            self.candidates[job.workload] += len(job.plans) == 1
            default = space.default_plan(job.spec, job.arch, "cpu")
            timings = tuple(summary([100.0 if plan == default else self.others_us] * 6) for plan in job.plans)
            yield job, Outcome(status=Status.OK, worst_error=0.1, timings=timings)


@pytest.mark.parametrize(("others_us", "default_stays"), [(99.5, True), (90.0, False)])
def test_on_the_cpu_few_plans_are_timed_and_the_default_stays_unless_beaten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, others_us: float, *, default_stays: bool
) -> None:
    clocked, out = Clocked(others_us), tmp_path / "out"
    monkeypatch.setenv("SPECATTN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setattr(tune_all_models, "lasting", lambda _: contextlib.nullcontext(clocked))
    monkeypatch.setattr(
        sys, "argv", ["specattn-tune", "all-models", "--model", MODEL, "--gpu", "cpu", "--out", str(out)]
    )
    cli.main()
    found = pack.load(out / "cpu" / f"{HEADS.name}.json")
    assert found.arch.cpu_model == cpu_info.model()
    assert set(clocked.candidates) == {entry.workload for entry in found.entries}
    assert set(clocked.candidates.values()) == {tune_all_models.MEASURED_TRIALS}
    for entry in found.entries:
        assert (entry.chosen_by, entry.latency_us) == ("measured", 100.0 if default_stays else others_us)
        assert (entry.plan == space.default_plan(entry.spec, cpu_info.detect(), "cpu")) == default_stays
