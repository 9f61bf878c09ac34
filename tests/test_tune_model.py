"""specattn-tune --explain and --calibrate: what the cost model says of plans, and of records it can be held against."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest

from imagined import imagined_fit
from specattn_codegen import environment, space
from specattn_codegen.cli import tune as cli
from specattn_codegen.cli.progress import microseconds
from specattn_codegen.cost_model import guess_resources, latency_us, predict
from specattn_codegen.cost_model.calibration import terms_by_limit
from specattn_codegen.errors import PackError
from specattn_codegen.heads import HeadConfig
from specattn_codegen.packs import pack_file
from specattn_codegen.plan import Plan
from specattn_codegen.processors import gpus
from specattn_codegen.spec import KernelSpec, Workload
from specattn_codegen.tuning import model_fit, record
from specattn_codegen.tuning.measure import summary
from specattn_codegen.tuning.outcome import Outcome, Status
from specattn_codegen.tuning.record import Record
from specattn_codegen.tuning.shortlist import ranked
from specattn_codegen.tuning.tune_session import Logbook, Target, compile_trial, measure_trial
from specattn_codegen.workloads import default_workloads

HEADS = HeadConfig(num_q_heads=8, num_kv_heads=2, head_dim=64)
SPEC = KernelSpec(op="verify_attention", heads=HEADS, dtype="bfloat16", page_size=16)
SIZES = (Workload(batch=1, q_len=1, kv_len=4096), Workload(batch=16, q_len=1, kv_len=32768))
H100 = Target(arch=gpus.find("h100"), backend="triton", is_present=True, page_size=16)
PLANS = list(space.feasible(SPEC, H100.arch, "triton"))[::40]


@pytest.fixture(autouse=True)
def own_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


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


def test_a_fit_is_written_and_then_taken_for_its_processor_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "records.jsonl"
    for trial in (slower(plan, size, {"memory": 1.5, "launch": 2.0}) for size in SIZES for plan in PLANS):
        record.append(path, trial)
    assert run(monkeypatch, "--calibrate", str(path)) == 0
    kept = tmp_path / "config" / "specattn" / "fits" / "h100.json"
    assert f"fit: {kept}" in capsys.readouterr().out
    factors = model_fit.load(kept, H100.arch).factors
    fitted = model_fit.fitted(H100.arch)
    assert dict(fitted.fit) == factors
    for plan in PLANS:
        resources = guess_resources(SPEC, plan, H100.arch)
        terms = terms_by_limit(predict(SPEC, SIZES[1], plan, H100.arch, resources))
        expected = sum(factors[limit] * microseconds for limit, microseconds in terms.items())
        assert predict(SPEC, SIZES[1], plan, fitted, resources).latency_us == pytest.approx(expected)
        assert latency_us(SPEC, SIZES[1], plan, fitted, resources) == pytest.approx(expected)

    asked = ("--heads", "8,2,64", "--op", "select_kv", "--explain")
    said = f"fitted to measurements on h100 (fit {environment.fit_digest(fitted)}"
    assert run(monkeypatch, *asked, "--gpu", "h100") == 0
    shown = capsys.readouterr().out
    assert said in shown
    select = KernelSpec(op="select_kv", heads=HEADS, selection="kv_head")
    size = default_workloads(select, fitted)[0]
    best = ranked(select, size, fitted, "triton")[0]
    prediction = predict(select, size, best, fitted, guess_resources(select, best, fitted))
    assert microseconds(prediction.latency_us) in shown
    assert run(monkeypatch, *asked, "--gpu", "a100") == 0
    assert "fitted" not in capsys.readouterr().out
    assert run(monkeypatch, *asked, "--gpu", "a100", "--fit", str(kept)) == 2
    assert "fitted to h100, another processor than this a100" in capsys.readouterr().err


def written_fit(path: Path, **changes: object) -> Path:
    """A fit of the H100, changed and written with the digest of what it then says."""
    whole = imagined_fit(H100.arch, {"memory": 1.5})
    model_fit.write(path, whole)
    assert model_fit.load(path, H100.arch) == whole
    path.write_text(pack_file.to_text({**json.loads(path.read_text()), **changes}))
    return path


BAD_FITS: dict[str, dict[str, object]] = {
    "must be from 0.1 to 10": {"factors": {"memory": 1e9}},
    "Expected `object`": {"factors": [1.5]},
    "schema_version 2 where": {"schema_version": 2},
    "another version of the cost model": {"model": "of last year"},
    "nested more than": {"note": json.loads("[" * 40 + "]" * 40)},
}


@pytest.mark.parametrize("said", BAD_FITS)
def test_a_bad_fit_is_an_error_where_named_and_one_warning_where_found(
    said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    path = written_fit(model_fit.user_path(H100.arch), **BAD_FITS[said])
    asked = ("--heads", "8,2,64", "--gpu", "h100", "--op", "select_kv", "--explain")
    assert run(monkeypatch, *asked, "--fit", str(path)) == 2
    refusal = capsys.readouterr().err
    assert said in refusal
    assert str(path) in refusal
    assert refusal.count("\n") == 1
    for _ in range(2):
        assert model_fit.fitted(H100.arch) == H100.arch
    (warning,) = [one.message for one in caplog.records if one.name == "specattn"]
    assert said in warning


def test_a_fit_that_was_edited_by_hand_is_refused(tmp_path: Path) -> None:
    path = written_fit(tmp_path / "fit.json")
    path.write_text(path.read_text().replace("1.5", "1.6"))
    with pytest.raises(PackError, match="its digest is not that of its contents"):
        model_fit.load(path, H100.arch)


def test_records_of_two_processors_make_no_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "records.jsonl"
    for plan in PLANS:
        trial = slower(plan, SIZES[0], {})
        record.append(path, trial)
        record.append(path, dataclasses.replace(trial, silicon=environment.silicon(gpus.find("h200"))))
    assert run(monkeypatch, "--calibrate", str(path)) == 2
    assert "measurements of several processors, h100 (sm_90a, 132), h200 (sm_90a, 132)" in capsys.readouterr().err


def test_what_was_predicted_by_another_fit_is_predicted_again() -> None:
    trial = compile_trial(SPEC, PLANS[0], dataclasses.replace(H100, is_present=False))
    as_it_is, fitted = (
        Logbook(H100, None, environment.current("triton", None, fit)).blank(trial).identity for fit in ("", "a fit")
    )
    assert as_it_is != fitted
    timed = measure_trial(SPEC, PLANS[0], SIZES[0], H100, seed=0, seconds=1.0)
    one, other = (
        Logbook(H100, None, environment.current("triton", None, fit)).blank(timed).identity for fit in ("", "a fit")
    )
    assert one == other


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
