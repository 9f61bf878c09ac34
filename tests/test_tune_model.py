"""specattn-tune --explain and --calibrate: what the cost model says of plans, and of records it can be held against."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from specattn_codegen import environment, gpus, record, space
from specattn_codegen.cli import tune as cli
from specattn_codegen.cli.progress import microseconds
from specattn_codegen.cost_model import guess_resources, predict
from specattn_codegen.cost_model.calibration import terms_by_limit
from specattn_codegen.heads import HeadConfig
from specattn_codegen.measure import summary
from specattn_codegen.outcome import Outcome, Status
from specattn_codegen.plan import Plan
from specattn_codegen.record import Record
from specattn_codegen.shortlist import ranked
from specattn_codegen.spec import KernelSpec, Workload
from specattn_codegen.tune_session import Logbook, Target, measure_trial

HEADS = HeadConfig(num_q_heads=8, num_kv_heads=2, head_dim=64)
SPEC = KernelSpec(op="verify_attention", heads=HEADS, dtype="bfloat16", page_size=16)
SIZES = (Workload(batch=1, q_len=1, kv_len=4096), Workload(batch=16, q_len=1, kv_len=32768))
H100 = Target(arch=gpus.find("h100"), backend="triton", is_present=True, page_size=16)
PLANS = list(space.feasible(SPEC, H100.arch, "triton"))[::40]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int | str | None:
    monkeypatch.setattr("sys.argv", ["specattn-tune", *arguments])
    try:
        cli.main()
    except SystemExit as stop:
        return stop.code
    return 0


def slower(plan: Plan, size: Workload, factors: dict[str, float]) -> Record:
    """A measurement of a GPU whose terms take `factors` times what the model says, without any noise."""
    book = Logbook(H100, None, environment.current("triton", "a test"))
    resources = guess_resources(SPEC, plan, H100.arch)
    terms = terms_by_limit(predict(SPEC, size, plan, H100.arch, resources))
    time = sum(factors.get(limit, 1.0) * microseconds for limit, microseconds in terms.items())
    outcome = Outcome(status=Status.OK, timings=(summary([time] * 6),), resources=resources)
    return dataclasses.replace(book.blank(measure_trial(SPEC, plan, size, H100, seed=0, seconds=1.0)), outcome=outcome)


def test_calibrating_finds_the_factors_that_measurements_speak_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, factors = tmp_path / "records.jsonl", {"memory": 1.5, "launch": 2.0}
    failed = dataclasses.replace(slower(PLANS[0], SIZES[0], {}), outcome=Outcome(status=Status.WRONG, detail="off"))
    for trial in (failed, *(slower(plan, size, factors) for size in SIZES for plan in PLANS)):
        record.append(path, trial)
    assert run(monkeypatch, "--calibrate", str(path)) == 0
    shown = capsys.readouterr().out
    assert f"{len(SIZES) * len(PLANS)} plans of {len(SIZES)} kernels and sizes" in shown
    rows = {
        label: [float(number.strip("%")) for number in numbers.split()]
        for label, numbers in re.findall(r"^ *(as it is|fitted) +(.*)$", shown, re.MULTILINE)
    }
    correlation, regret, error = rows["fitted"]
    assert correlation >= rows["as it is"][0]
    assert correlation > 0.99
    assert regret <= rows["as it is"][1]
    assert error < 2.0 < 20.0 < rows["as it is"][2]  # percent
    found = {name: float(value) for name, value in re.findall(r"(\w+) x ([\d.]+)", shown)}
    for limit, factor in factors.items():
        assert found[limit] == pytest.approx(factor, rel=0.1)  # held back a little by the belief in the model


def test_too_few_measurements_are_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "records.jsonl"
    path.touch()
    assert run(monkeypatch, "--calibrate", str(path)) == 2
    assert f"{path}: holds no measured trial" in capsys.readouterr().err
    for plan in PLANS[:2]:
        record.append(path, slower(plan, SIZES[0], {}))
    assert run(monkeypatch, "--calibrate", str(path)) == 2
    shown = capsys.readouterr().err
    assert "too few measured plans" in shown
    assert shown.count("\n") == 1


def test_explaining_says_which_term_binds_the_default_and_the_models_choice(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("--heads", "8,2,64", "--gpu", "h100", "--op", "verify_attention", "--explain")
    assert run(monkeypatch, *asked) == 0
    shown = capsys.readouterr().out
    assert "nothing was built or timed" in shown
    size = Workload(batch=16, q_len=1, kv_len=32768)
    part = shown[shown.index(f"{SPEC.name} {size.name}") :]
    default = space.default_plan(SPEC, H100.arch, "triton")
    for label, plan in (("default", default), ("the model's choice", ranked(SPEC, size, H100.arch, "triton")[0])):
        part = part[part.index(label) :]
        prediction = predict(SPEC, size, plan, H100.arch, guess_resources(SPEC, plan, H100.arch))
        (total,) = re.findall(r"in all.*", part[: part.index("in all") + 200])[:1]
        assert prediction.bound in total
        assert microseconds(prediction.latency_us) in total
