"""specattn-bench verify: the command as people run it, its peers against the oracle, and what it derives from times."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import get_args

import pytest
import torch

from specattn_bench import ceilings, cli, measured, peers, report, verify_measured
from specattn_bench.ceilings import Ceilings
from specattn_bench.plans import DEFAULT, Chosen, NotServedError
from specattn_bench.roofline import floor_of, method_work
from specattn_bench.timing import in_turn
from specattn_bench.verify_series import READING, SCORES, Asked, Case
from specattn_codegen.cost_model.floor import Work, least_work
from specattn_codegen.heads import HeadConfig
from specattn_codegen.packs.ladder import Rung
from specattn_codegen.plan import Plan
from specattn_codegen.processors import cpu_info
from specattn_codegen.proof import reference
from specattn_codegen.proof.check import Verdict
from specattn_codegen.proof.problems import attention_problem
from specattn_codegen.spec import KernelSpec, Workload

TINY = ("--heads", "4,2,16", "--keys", "256", "--rows", "1", "--dtype", "float32", "--seconds", "0.02")
HEADS = HeadConfig(num_q_heads=4, num_kv_heads=2, head_dim=16)
RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int | str | None:
    """The command in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", ["specattn-bench", "verify", *arguments])
    try:
        cli.main()
    except SystemExit as stop:
        return stop.code
    return 0


def test_a_tiny_run_prints_writes_and_draws(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(ceilings, "MATRIX_EXTENT", 64)
    written, drawn = tmp_path / "new" / "verify.json", tmp_path / "verify.png"
    wanted = ("--scores", "none", "--scores", "ends-layer", "--json", str(written), "--plot", str(drawn))
    assert run(monkeypatch, *TINY, *wanted) == 0
    assert "measured: q4-kv2-d16, 256 keys" in capsys.readouterr().out
    assert drawn.read_bytes().startswith(b"\x89PNG")
    answer = json.loads(written.read_text())
    assert (answer["question"], answer["label"], answer["heads"]) == ("verify", "measured", "q4-kv2-d16")
    best = answer["ceilings"]["best"]
    assert best["bandwidth_gbs"] == max(answer["ceilings"][when]["bandwidth_gbs"] for when in ("before", "after"))
    by_name = {result["series"]: result for result in answer["results"]}
    assert list(by_name) == ["none", "ends-layer", READING, *peers.PEERS]
    reading = by_name[READING]["median_us"]
    unscored = [by_name[name]["median_us"] for name in peers.PEERS if name != peers.WITH_SCORES]
    for result in by_name.values():
        assert result["status"] == "timed"
        assert result["p20_us"] <= result["median_us"] <= result["p80_us"]
        assert result["n"] >= 6
        floor = max(
            result["least_bytes"] / best["bandwidth_gbs"] / 1e3,
            result["least_operations"] / best["tflops"]["float32"] / 1e6,
        )
        assert result["floor_us"] == pytest.approx(floor, abs=0.06)
        assert result["share_of_reading"] == pytest.approx(reading / result["median_us"], rel=0.02)
        assert result["times_best_peer"] == pytest.approx(min(unscored) / result["median_us"], rel=0.02)
    plain, scored = by_name["none"], by_name["ends-layer"]
    assert scored["overhead_over_none"] == pytest.approx(scored["median_us"] / plain["median_us"] - 1, abs=0.02)
    assert plain["overhead_over_none"] is None
    assert plain["plan_found"] in get_args(Rung)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--heads", "32,8"], "as in 32,8,128"),
        (["--heads", "32,5,128"], "query heads must be a multiple"),
        (["--dtype", "int8"], "bfloat16"),
        (["--scores", "all"], "all-kv_head"),
        (["--keys", "8", "--rows", "8"], "--rows 8: must be fewer than --keys 8"),
        (["--rows", "0"], "0 is not in the range"),
        (["--seconds", "0"], "--seconds 0: must be above 0"),
        (["--plan", "key_tile"], "name=value"),
        (["--plan", "tile=3"], "there are product, key_tile"),
        (["--plan", "key_tile=3"], "key_tile=3 is not one of"),
        (["--plan", "block_m=16", "--gpu", "cpu"], "leave --gpu out"),
        (["--plan", "key_tile=32", "--gpu", "h100"], "no such setting on h100"),
        (["--gpu", "h10"], "h100"),
        (["--gpu", "h100", "--save"], "use --json"),
        (["--gpu", "h100", "--plot", "x.png"], "use --json"),
        (["--plot", "x.gif"], "must end in .png, .svg, .pdf"),
        (["--json", "/proc/nowhere/x.json"], "--json /proc/nowhere/x.json: cannot be written"),
    ],
)
def test_bad_options_are_one_clear_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    """And nothing is measured before they are found."""
    monkeypatch.setattr(ceilings, "measure", lambda *_: pytest.fail("measured before the options were read"))
    assert run(monkeypatch, *arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1
    assert says in shown.err


def test_a_gpu_that_is_absent_is_labelled_modelled(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    written = tmp_path / "verify.json"
    arguments = ("--gpu", "h100", "--scores", "none", "--rows", "1", "--batch", "1", "--json", str(written))
    assert run(monkeypatch, *arguments) == 0
    shown = capsys.readouterr().out
    assert "modelled: q32-kv8-d128, 32768 keys; no GPU was timed" in shown
    answer = json.loads(written.read_text())
    (result,) = answer["results"]
    assert answer["label"] == result["label"] == "modelled"
    assert (result["gpu"], result["dtype"], result["keys"]) == ("h100", "bfloat16", 32768)
    least = 32768 * 8 * 2 * 128 * 2 / 3350e3  # the bytes of K and V at the data sheet's rate, in microseconds
    assert result["predicted_us"] > least
    assert 0 < result["share_of_floor"] < 1
    assert result["bytes_moved"] >= result["bytes_least"] >= 32768 * 8 * 2 * 128 * 2
    assert 0 < result["residency"]["occupancy"] <= 1
    assert result["predicted_us"] == pytest.approx(sum(term["microseconds"] for term in result["terms"]), abs=0.01)


@pytest.mark.parametrize("name", list(peers.PEERS))
@pytest.mark.parametrize("rows", [1, 5])
def test_peers_do_the_same_work(name: str, rows: int) -> None:
    spec = KernelSpec(op="verify_attention", heads=HEADS, score=SCORES["all-kv_head"])
    problem = attention_problem(spec, q_lens=[rows, rows], kv_lens=[100, 100], page_size=16, seed=3)
    expected = reference.verify_attention(
        *(problem.q, problem.k_cache, problem.v_cache, problem.page_table, problem.kv_lens, problem.cu_q),
        heads=HEADS,
        score=spec.score,
        max_kv=100,
    )
    result = peers.PEERS[name](peers.dense_inputs(HEADS, problem))()
    out, scores = result if isinstance(result, tuple) else (result, None)
    assert isinstance(out, torch.Tensor)
    by_head = out.reshape(2, HEADS.num_q_heads, rows, HEADS.v_head_dim).transpose(1, 2)
    torch.testing.assert_close(by_head.reshape(expected.out.shape).double(), expected.out, rtol=1e-5, atol=1e-5)
    assert (scores is not None) == (name == peers.WITH_SCORES)
    if scores is not None and expected.scores is not None:
        prefix = 100 - rows
        torch.testing.assert_close(scores[..., :prefix].double(), expected.scores[..., :prefix], rtol=1e-4, atol=1e-7)


def asked(*scores: str) -> tuple[Asked, Case]:
    case = Case(dtype="float32", workload=Workload(batch=1, q_len=1, kv_len=64))
    return (
        Asked(heads=HEADS, cases=(case,), scores=scores, page_size=16, plans=DEFAULT),
        case,
    )


def test_what_a_backend_refuses_or_gets_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    choose = measured.choose

    def refuse_ends(spec: KernelSpec, *others: object) -> Chosen:
        if spec.score == SCORES["ends-layer"]:
            raise NotServedError("ends are not made here")
        return choose(spec, *others)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(measured, "choose", refuse_ends)
    monkeypatch.setattr(measured, "prove", lambda *_, **__: Verdict(passed=False, worst=9.0, detail="out 9"))
    question, case = asked("none", "ends-layer")
    wrong, refused, *others = verify_measured.measure_case(question, case, cpu_info.detect(measure=False), 0.02)
    assert (wrong.timing, wrong.refused) == (None, "not served: wrong results, out 9")
    assert (refused.timing, refused.refused) == (None, "not served: ends are not made here")
    assert [one.name for one in others] == [READING, *peers.PEERS]
    assert all(one.timing and not one.refused for one in others)


def test_the_floor_is_the_longer_of_bytes_and_operations() -> None:
    rates = Ceilings(bandwidth_gbs=10.0, tflops={"float32": 0.1, "bfloat16": 0.2})
    moved = floor_of(Work(memory_bytes=20_000, operations=100_000), "float32", rates)
    assert (moved.microseconds, moved.bound) == (pytest.approx(2.0), "memory")
    computed = floor_of(Work(memory_bytes=20_000, operations=600_000), "bfloat16", rates)
    assert (computed.microseconds, computed.bound) == (pytest.approx(3.0), "operations")


def test_exact_weights_are_kept_or_made_again() -> None:
    workload = Workload(batch=2, q_len=5, kv_len=105)
    spec = KernelSpec(op="verify_attention", heads=HEADS, score=SCORES["ends-layer"])
    least = least_work(spec, workload)
    kept = method_work(spec, workload, Plan.of("cpu", score_method="dump", score_dump="float16"))
    assert kept.memory_bytes - least.memory_bytes == 2 * (2 * 2 * 4 * 100) * 2  # both ways, requests, ends, heads, keys
    again = method_work(spec, workload, Plan.of("cpu", score_method="remat", score_dump="float16"))
    per_key = HEADS.num_kv_heads * HEADS.head_dim * spec.cache_bytes
    assert again.memory_bytes - least.memory_bytes == 2 * 100 * per_key
    assert again.operations - least.operations == 2 * (2 * 2 * 4 * 100) * HEADS.head_dim
    assert method_work(spec, workload, Plan.of("cpu", key_tile=32)) == least


def test_series_share_the_turns_of_their_data() -> None:
    """So that a series never finds what the one before it has just read."""
    seen: list[str] = []
    turn = iter([0, 1, 2, 0])
    first, second = ([lambda name=f"{who}{copy}": seen.append(name) for copy in range(3)] for who in "ab")
    for launch in (in_turn(first, turn), in_turn(second, turn)):
        launch()
        launch()
    assert seen == ["a0", "a1", "b2", "b0"]


def test_results_lie_where_their_processor_says() -> None:
    files = list(RESULTS.glob("cpu-*/verify.json"))
    assert files
    for file in files:
        assert report.slug(json.loads(file.read_text())["processor"]) == file.parent.name
