"""specattn-bench select, sparse and mixed: the commands as people run them, and their peers against the oracle."""

from __future__ import annotations

import ctypes
import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch

from specattn_bench import ceilings, cli, measured, mixed_measured, mixed_series, selection_series, sparse_series
from specattn_bench.ceilings import Ceilings
from specattn_bench.plans import DEFAULT
from specattn_bench.selection_measured import WARM_START, work_of
from specattn_bench.selection_peers import peers_of
from specattn_bench.series import Series
from specattn_bench.sparse_measured import ALL_KEYS
from specattn_bench.sparse_peers import PEERS, caches_of, gathering_of
from specattn_bench.sparse_series import disjoint_selections
from specattn_bench.standing import Beside, standings
from specattn_codegen.build import cpu
from specattn_codegen.calls import select_call
from specattn_codegen.cost_model.floor import Work
from specattn_codegen.heads import HeadConfig
from specattn_codegen.policy import TopK
from specattn_codegen.processors import cpu_info
from specattn_codegen.proof import reference
from specattn_codegen.proof.check import Verdict, expect_attention
from specattn_codegen.proof.problems import attention_problem, random_scores
from specattn_codegen.render import render_text
from specattn_codegen.results import Selection
from specattn_codegen.tuning.measure import summary

HEADS = HeadConfig(num_q_heads=4, num_kv_heads=2, head_dim=16)
TINY = ("--heads", "4,2,16", "--seconds", "0.02", "--dtype", "float32")
MACHINE = Ceilings(bandwidth_gbs=10.0, tflops={"float32": 0.1}, gather_gbs={64: 5.0, 128: 6.0, 2048: 8.0})


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int | str | None:
    """The command in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", ["specattn-bench", *arguments])
    try:
        cli.main()
    except SystemExit as stop:
        return stop.code
    return 0


def answered(monkeypatch: pytest.MonkeyPatch, folder: Path, *arguments: str) -> dict[str, dict[str, dict[str, object]]]:
    """The results of a tiny run by case and series, on a machine of known ceilings."""
    monkeypatch.setattr(ceilings, "measure", lambda *_: MACHINE)
    written, drawn = folder / "answer.json", folder / "answer.png"
    assert run(monkeypatch, *arguments, *TINY, "--json", str(written), "--plot", str(drawn)) == 0
    assert drawn.read_bytes().startswith(b"\x89PNG")
    answer = json.loads(written.read_text())
    assert (answer["question"], answer["label"], answer["heads"]) == (arguments[0], "measured", "q4-kv2-d16")
    found: dict[str, dict[str, dict[str, object]]] = {}
    for result in answer["results"]:
        assert result["status"] == "timed"
        assert result["gbs"] == pytest.approx(result["least_bytes"] / result["median_us"] / 1e3, abs=0.01, rel=0.01)
        case = "-".join(str(result[name]) for name in ("rule", "selection", "block") if name in result)
        found.setdefault(case, {})[result["series"]] = result
    return found


def test_selection_is_timed_beside_torch_and_verification(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sizes = ("--size", "2x256", "--rule", "top-5%", "--rule", "top-p-0.95", "--layers", "2", "--threads", "1")
    found = answered(monkeypatch, tmp_path, "select", *sizes)
    assert list(found) == ["top-5%", "top-p-0.95"]
    best = found["top-5%"]
    assert list(best)[:2] == ["from the scores", WARM_START]
    assert best["from the scores"]["least_bytes"] == 4 * (256 * 4 + 13 * 4 + 4)  # of two layers
    assert list(best)[-1] == "verifying 2 layers, 5 rows"
    share = found["top-p-0.95"]
    assert share["bisection, 10 steps"]["least_bytes"] > share["the smallest set"]["least_bytes"]  # type: ignore[operator]


def test_sparse_attention_is_timed_beside_torch_and_verification(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = answered(monkeypatch, tmp_path, "sparse", "--keys", "256", "--budget", "32", "--rows", "2", "--block", "16")
    assert list(found) == ["per-head-16", "per-layer-16"]
    for series in found.values():
        assert list(series) == ["sparse", ALL_KEYS, *PEERS]
        median = series["sparse"]["median_us"]
        assert isinstance(median, float)
        assert series["sparse"]["times_all_keys"] == pytest.approx(series[ALL_KEYS]["median_us"] / median, rel=0.01)  # type: ignore[operator]
    ours = found["per-layer-16"]["sparse"]
    assert ours["scattered_row_bytes"] == 16 * 2 * 16 * 4
    assert ours["share_of_gather_ceiling"] == pytest.approx(ours["gbs"] / 8.0, abs=0.002)  # type: ignore[operator]


def test_a_mixed_batch_is_timed_beside_its_parts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = answered(monkeypatch, tmp_path, "mixed", "--keys", "256", "--budget", "32", "--requests", "3")
    (series,) = found.values()
    assert list(series) == ["one launch", mixed_measured.APART, mixed_measured.ALL_VERIFYING]
    assert series["one launch"]["least_bytes"] == series[mixed_measured.APART]["least_bytes"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["select", "--size", "32768"], "as in 32x131072"),
        (["select", "--rule", "top-7"], "top-2048"),
        (["select", "--plan", "key_tile=64"], "there are sampled"),
        (["sparse", "--budget", "32768"], "must leave room in --keys 32768"),
        (["sparse", "--budget", "100"], "--block 16: must divide --budget 100"),
        (["sparse", "--seconds", "-1"], "must be above 0"),
        (["mixed", "--verifying", "8"], "must be fewer than --requests 8"),
        (["mixed", "--gpu", "h100"], "model verify and sparse"),
        (["mixed", "--plot", "x.gif"], "must end in .png"),
    ],
)
def test_bad_options_are_one_clear_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    monkeypatch.setattr(ceilings, "measure", lambda *_: pytest.fail("measured before the options were read"))
    assert run(monkeypatch, *arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1
    assert says in shown.err


@pytest.mark.parametrize("question", ["select", "sparse"])
def test_a_gpu_that_is_absent_is_labelled_modelled(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, question: str
) -> None:
    few = ("--rule", "top-5%", "--size", "1x32768", "--layers", "0") if question == "select" else ("--rows", "1")
    written = tmp_path / "answer.json"
    assert run(monkeypatch, question, "--gpu", "h100", *few, "--json", str(written)) == 0
    answer = json.loads(written.read_text())
    assert answer["label"] == "modelled"
    for result in answer["results"]:
        assert (result["label"], result["status"], result["gpu"]) == ("modelled", "modelled", "h100")
        assert result["predicted_us"] > result["bytes_least"] / 3350e3  # at the data sheet's rate


@pytest.mark.parametrize("rule", list(selection_series.RULES))
def test_selection_peers_choose_what_the_oracle_does(rule: str) -> None:
    """Scores without ties; budgets of 2,048 keys are more than a row has, and pages stand for the columns."""
    asked = selection_series.RULES[rule]
    scores = random_scores(2, 2, [], 4000, seed=3)
    lengths = torch.full((2,), scores.shape[-1] * asked.block, dtype=torch.int32)
    expected = reference.select_kv(scores, lengths, asked.policy, block=asked.block)
    wanted = [
        set(row[:n].tolist()) for row, n in zip(expected.indices.flatten(0, 1), expected.counts.flatten(), strict=True)
    ]
    for name, peer in peers_of(asked).items():
        chosen = peer(scores)
        if len(chosen) == 2:
            got = [set(row[:n].tolist()) for row, n in zip(chosen[0].flatten(0, 1), chosen[1].flatten(), strict=True)]
        else:
            rows = chosen[0] * 2 + chosen[1]
            got = [set(chosen[2][rows == row].tolist()) for row in range(4)]
        if "bisection" in name:
            assert all(more >= few for more, few in zip(got, wanted, strict=True)), name
        else:
            assert got == wanted, name


@pytest.mark.parametrize("name", list(PEERS))
@pytest.mark.parametrize(
    ("selection", "block"), [("per-head", 1), ("per-head", 16), ("per-layer", 1), ("per-layer", 16)]
)
def test_gathering_peers_do_the_same_work(name: str, selection: str, block: int) -> None:
    case = sparse_series.Case(dtype="float32", rows=3, keys=160, budget=48, selection=selection, block=block)
    asked = sparse_series.Asked(heads=HEADS, cases=(case,), page_size=16, plans=DEFAULT)
    spec = asked.sparse_spec(case)
    problem = attention_problem(spec, q_lens=[3], kv_lens=[160], page_size=16, seed=5, budget=1)
    (indices, *_) = disjoint_selections(spec.selection_heads, case.tail_start, 48, block, 1, seed=7)
    chosen = Selection(indices, indices.new_full(indices.shape[:2], indices.shape[2]), block)
    expected = reference.sparse_attention(
        *(problem.q, problem.k_cache, problem.v_cache, problem.page_table, problem.kv_lens, problem.cu_q),
        chosen,
        problem.tail_start,
        heads=HEADS,
    )
    out = PEERS[name](caches_of(problem), gathering_of(case, HEADS, problem.q, indices))()
    assert isinstance(out, torch.Tensor)
    by_row = out.view(HEADS.num_kv_heads * HEADS.group, 3, HEADS.v_head_dim).transpose(0, 1)
    torch.testing.assert_close(by_row.double(), expected.out, rtol=1e-5, atol=1e-5)


def test_selections_of_turns_share_no_key() -> None:
    found = disjoint_selections(2, 163, 48, 16, 8, seed=1)
    assert [tuple(one.shape) for one in found] == [(1, 2, 3)] * 3  # of ten whole blocks before the tail
    for row in range(2):
        together = torch.cat([one[0, row] for one in found]).tolist()
        assert len(set(together)) == 9
        assert max(together) < 10
    assert all(bool((one.diff(dim=-1) > 0).all()) for one in found)


def test_a_mixed_batch_is_its_parts_joined() -> None:
    case = mixed_series.Case(dtype="float32", requests=3, verifying=1, rows=2, keys=96, budget=16)
    asked = mixed_series.Asked(heads=HEADS, cases=(case,), page_size=16, plans=DEFAULT)
    batches = mixed_series.batches_of(asked, case, seed=2)[1]
    mixed = expect_attention(asked.spec(case, "mixed_attention"), batches.mixed)
    verified = expect_attention(asked.spec(case, "verify_attention"), batches.verifying)
    drafted = expect_attention(asked.spec(case, "sparse_attention"), batches.drafting)
    torch.testing.assert_close(mixed.out, torch.cat([verified.out, drafted.out]), rtol=0, atol=0)
    torch.testing.assert_close(mixed.lse, torch.cat([verified.lse, drafted.lse]), rtol=0, atol=0)


def test_a_kernel_that_is_wrong_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ceilings, "measure", lambda *_: MACHINE)
    monkeypatch.setattr(measured, "prove", lambda *_, **__: Verdict(passed=False, worst=9.0, detail="out 9"))
    few = ("--keys", "256", "--budget", "32", "--rows", "1", "--block", "1", "--selection", "per-layer")
    assert run(monkeypatch, "sparse", *few, *TINY) == 0
    shown = capsys.readouterr().out
    assert "ours, sparse: not served: wrong results, out 9" in shown
    assert "index_select, heads first, matmuls" in shown


def test_ratios_are_to_the_fastest_of_the_others() -> None:
    case = mixed_series.Case(dtype="float32", requests=2, verifying=1, rows=1, keys=64, budget=8)
    work = Work(memory_bytes=20_000, operations=100)
    times = {"ours": 4.0, "slow": 40.0, "fast": 12.0}
    series = [
        Series(
            case=case,
            name=name,
            kind="ours" if name == "ours" else "peer",
            work=work,
            scattered=64 if name == "ours" else None,
            timing=summary([time] * 9),
        )
        for name, time in times.items()
    ]
    beside = Beside(key="times", column="x", said="peers", others=lambda one: one.kind == "peer")
    nobody = Beside(key="none", column="x", said="nobody", others=lambda one: one.name == "absent")
    ours, slow, _ = standings(series, MACHINE, (beside, nobody))
    assert ours.ratios == {"times": pytest.approx(3.0), "none": None}
    assert slow.ratios["times"] == pytest.approx(0.3)
    assert (ours.gbs, ours.share_of_read, ours.share_of_gather) == pytest.approx((5.0, 0.5, 1.0))
    assert (slow.share_of_gather, ours.share_of_floor) == (None, pytest.approx(0.5))


def test_the_work_of_a_selection_counts_what_was_chosen() -> None:
    call = select_call(random_scores(1, 2, [], 100, seed=1), torch.tensor([100], dtype=torch.int32), TopK(k=7))
    call.counts.fill_(7)
    assert work_of(call) == Work(memory_bytes=2 * (100 * 4 + 7 * 4 + 4), operations=200)


@pytest.mark.parametrize("lines", [1, 4, 8])
def test_the_gather_probe_reads_every_row_once(lines: int) -> None:
    target = cpu_info.detect(measure=False).target
    library = cpu.load_library(render_text("cpu/probe.cpp.jinja", target=target), target, "the machine probe")
    library.gather_seconds.restype = ctypes.c_double
    data, sink = torch.ones(256 * lines * 16), torch.zeros(2)
    data.view(256, -1)[17] = 3.0
    rows = torch.randperm(256, generator=torch.Generator().manual_seed(lines))
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (data, rows, sink)]
    for pattern in range(library.gather_patterns()):
        sink.zero_()
        seconds = library.gather_seconds(*pointers[:2], ctypes.c_int64(256), lines, 2, pattern, pointers[2])
        assert seconds > 0
        assert float(sink.sum()) == float(data.sum())


def test_the_ceiling_of_scattered_rows_counts_whole_lines() -> None:
    """Rows of 100 bytes take two lines of a cache."""
    small = dataclasses.replace(cpu_info.detect(measure=False), l2_bytes=1 << 16)
    assert 0.01 < ceilings.gather_gbs(small, 100) < 5000
