"""specattn-bench acceptance: its passages, what it observes, what it concludes, the command as people run it."""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from pathlib import Path

import pytest
import torch

from specattn_bench import acceptance, acceptance_report, cli
from specattn_bench.acceptance_report import findings, summarise
from specattn_bench.acceptance_study import (
    EVERYTHING,
    FORCED,
    GENERATED,
    SERIES,
    Case,
    Observed,
    Run,
    Study,
    by_place,
    grouped,
)
from specattn_bench.acceptance_texts import SETS, Passage, Texts
from specattn_bench.corpus import Corpus
from specattn_bench.episodes import KINDS
from specattn_codegen.errors import SpecError
from specattn_runtime.decoding.decode_spec import DecodeSpec
from specattn_runtime.decoding.engine import generate
from specattn_runtime.decoding.reference_kernels import ReferenceKernels
from specattn_runtime.model.llama import Llama
from specattn_runtime.model.tokens import ByteCodec
from tiny_models import one_thread, save_checkpoint, wavy_llama  # noqa: F401 - a fixture that applies by being here

SOURCE = "".join(
    f"def step_{i}(state, offset_{i % 3}):\n    return state * {i} + offset_{i % 3}\n\n" for i in range(60)
)


class Pairs(ByteCodec):
    """Two bytes a token."""

    def encode(self, prompt: bytes) -> list[int]:
        return [one ^ other for one, other in zip(prompt[::2], prompt[1::2], strict=False)]


@pytest.fixture(scope="module")
def texts() -> Texts:
    return Texts(corpus=Corpus(names=("a.py",), texts=(SOURCE.encode(),)), codec=ByteCodec(), seed=0)


def test_plain_passages_are_the_text_itself(texts: Texts) -> None:
    first, second = texts.passages("plain", 300, 40, 2)
    for one in (first, second):
        assert (len(one.prompt), len(one.following)) == (300, 40)
        assert bytes(one.prompt + one.following) in texts.corpus.joined
    assert first.prompt != second.prompt
    assert texts.passages("plain", 300, 40, 2) == [first, second]
    assert first.digest != second.digest


def test_long_range_passages_end_their_prompts_amid_the_uses(texts: Texts) -> None:
    found = texts.passages("long-range", 1200, 60, 6)
    assert [one.kind for one in found] == [*KINDS, *KINDS]
    assert all((len(one.prompt), len(one.following), len(one.places)) == (1200, 60, 60) for one in found)
    for one in found[:2]:  # values in quotes
        for place, (before, what) in enumerate(itertools.pairwise(one.following)):
            assert (one.places[place + 1] == "start") == (before == ord("'") and one.places[place + 1] != "other")
            assert one.places[place + 1] != "inside" or one.places[place] in ("start", "inside")
            assert one.places[place + 1] == "other" or chr(what).isalnum()
    lookups, names = (bytes(one.prompt[-150:] + one.following) for one in found[:2])
    assert lookups.count(b"assert ") >= 2
    assert names.count(b"check(") >= 2


def test_contexts_are_in_tokens(texts: Texts) -> None:
    pairs = Texts(corpus=texts.corpus, codec=Pairs(), seed=0)
    assert pairs.bytes_a_token == pytest.approx(2.0)
    for text_set in SETS:
        (found,) = pairs.passages(text_set, 500, 30, 1)
        assert abs(len(found.prompt) - 500) <= 1
        assert len(found.following) == 30


def test_too_little_text_is_said(texts: Texts) -> None:
    with pytest.raises(SpecError, match=r"--text: \d+ bytes, and a passage takes \d+; give more text"):
        texts.passages("plain", 90_000, 40, 1)


@pytest.fixture(scope="module")
def model() -> Llama:
    return wavy_llama()


@pytest.fixture(scope="module")
def passages(texts: Texts) -> list[Passage]:
    return [*texts.passages("plain", 90, 25, 2), *texts.passages("long-range", 120, 25, 1)]


def observe(
    model: Llama, passages: list[Passage], cases: list[Case], modes: tuple[str, ...] = (FORCED,), rounds: int = 4
) -> dict[tuple[str, Case, int], Observed]:
    study = Study(model, ReferenceKernels(model.heads), passages, cases, rounds=rounds)
    found = [one for _, group in grouped(cases) for one in study.run(Run(context=0, modes=modes, cases=group))]
    assert len(found) == len(cases) * len(passages) * len(modes)
    return {(one.mode, one.case, one.passage): one for one in found}


def test_budgets_that_share_a_batch_give_what_they_give_alone(model: Llama, passages: list[Passage]) -> None:
    cases = [Case(series="pillar", budget=budget, draft_len=3) for budget in (0.1, 0.4)]
    cases += [Case(series="quest", budget=0.4, draft_len=draft_len) for draft_len in (5, 3)]
    together = observe(model, passages, cases)
    for case in cases:
        for key, one in observe(model, passages, [case]).items():
            assert together[key].tokens == pytest.approx(one.tokens, rel=1e-9)
            assert together[key].agreeing == one.agreeing
    few, many = (sum(together[FORCED, case, place].tokens for place in range(3)) for case in cases[:2])
    assert 3 < few < many < 12


def test_a_rounds_drafts_are_the_tokens_after_its_newest_one() -> None:
    holding = torch.tensor([[0.1, 0.2], [0.3, 0.4]])
    places = ["start", "inside", "other", "start", "start", "other", "start"]
    assert by_place(holding, places) == {
        "inside": [pytest.approx(0.1)],
        "other": [pytest.approx(0.2), pytest.approx(0.4)],
        "start": [pytest.approx(0.3)],
    }
    assert by_place(holding, ()) == {}


def test_with_every_key_all_drafts_hold(model: Llama, passages: list[Passage]) -> None:
    cases = [Case(series=EVERYTHING, budget=0.07, draft_len=draft_len) for draft_len in (2, 5)]
    for (_, case, _), one in observe(model, passages, cases).items():
        assert one.tokens == pytest.approx(case.draft_len + 1, rel=1e-6)
        assert one.agreeing == case.draft_len + 1


def test_what_is_generated_is_what_sessions_generate(model: Llama, passages: list[Passage]) -> None:
    cases = [Case(series=series, budget=0.1, draft_len=2) for series in ("streaming", EVERYTHING)]
    found = observe(model, passages, cases, tuple(GENERATED), rounds=3)
    assert all(one.tokens == 3 for (mode, case, _), one in found.items() if (mode, case) == ("greedy", cases[1]))
    for mode, sampling in GENERATED.items():
        for number, passage in enumerate(passages):
            own = dataclasses.replace(sampling, seed=number)
            spec = DecodeSpec(preset=cases[0].preset, draft_len=2, budget=0.1, sampling=own, max_new_tokens=10)
            (alone,) = generate(model, ReferenceKernels(model.heads), [passage.prompt], spec).requests
            assert found[mode, cases[0], number].tokens == 1 + sum(alone.accepted[:3]) / 3


def test_runs_start_where_the_prompts_end_whatever_ran_before(model: Llama, passages: list[Passage]) -> None:
    cases = [
        Case(series=series, budget=0.1, draft_len=draft_len) for series in ("pillar", "quest") for draft_len in (2, 4)
    ]
    study = Study(model, ReferenceKernels(model.heads), passages, cases, rounds=2)
    runs = [Run(context=0, modes=modes, cases=[case]) for case in cases for modes in ((FORCED,), tuple(GENERATED))]
    first = [[one.tokens for one in study.run(run)] for run in runs]
    for run, before in zip(reversed(runs), reversed(first), strict=True):
        assert [one.tokens for one in study.run(run)] == pytest.approx(before, rel=1e-6)
    assert len({study.key(run) for run in runs}) == len(runs)


def observed(tokens: dict[tuple[str, int], float], mode: str = "forced") -> list[Observed]:
    """tokens: by series and passage."""
    return [
        Observed(mode=mode, case=Case(series=series, budget=0.07, draft_len=6), passage=place, tokens=found)
        for (series, place), found in tokens.items()
    ]


def passage(text_set: str, context: int) -> Passage:
    return Passage(text_set=text_set, kind="plain", context=context, prompt=[1], following=[2])


def test_summaries_are_paired_with_streaming() -> None:
    mine = observed({("hybrid", 0): 5.0, ("hybrid", 1): 6.0, ("streaming", 0): 4.0, ("streaming", 1): 4.0})
    hybrid, streaming = summarise(mine, [passage("plain", 1024)] * 2)
    assert (hybrid.tokens, hybrid.beside, hybrid.passages) == (5.5, 1.375, 2)
    assert hybrid.by_kind == {"plain": 5.5}
    assert hybrid.error == pytest.approx(0.5)  # of 1 and 2
    assert (streaming.beside, streaming.error) == (1.0, 0.0)
    assert summarise(mine[:1], [passage("plain", 1024)])[0].beside is None


def test_findings_are_of_long_contexts_and_guided_series() -> None:
    where = [passage("plain", 1024), passage("long-range", 1024), passage("long-range", 8192)]
    tokens = {("streaming", 0): 5.0, ("streaming", 1): 6.9, ("streaming", 2): 4.0}
    tokens |= {("hybrid", 0): 4.9, ("hybrid", 1): 1.0, ("hybrid", 2): 5.6, ("quest", 2): 7.0}
    tokens |= {("pillar", 0): 5.0, ("pillar", 2): 4.0, ("reference", 0): 4.7, ("reference", 2): 3.9}
    tokens |= {(EVERYTHING, place): 7.0 for place in range(3)}
    far, plain, *twins, everything = findings(summarise(observed(tokens), where), budget=0.07, draft_len=6)
    assert ("hybrid" in far.question, far.found, far.met) == (True, pytest.approx(1.4), True)
    assert ("pillar" in plain.question, plain.found, plain.met) == (True, pytest.approx(1.0), True)
    assert [(twin.found, twin.met) for twin in twins] == [(pytest.approx(0.94), False), (pytest.approx(0.975), True)]
    assert everything.met
    tokens[EVERYTHING, 1] = 6.9
    assert not findings(summarise(observed(tokens), where), budget=0.07, draft_len=6)[-1].met
    assert findings(summarise(observed(tokens, "greedy"), where), budget=0.07, draft_len=6) == []


def test_the_grid_has_every_cell_once(tmp_path: Path) -> None:
    cells = [(budget, draft_len) for budget in (0.03, 0.1) for draft_len in (4, 6)]
    found = [
        Observed(mode=mode, case=Case(series=series, budget=budget, draft_len=draft_len), passage=0, tokens=tokens)
        for (mode, series), tokens in {
            ("forced", "quest"): 2.5,
            ("forced", EVERYTHING): 3.5,
            ("greedy", "quest"): 4.5,
        }.items()
        for budget, draft_len in (cells[:1] if series == EVERYTHING else cells)
    ]
    acceptance_report.write_grid(tmp_path / "grid.md", "tiny", summarise(found, [passage("plain", 1024)]))
    lines = (tmp_path / "grid.md").read_text().splitlines()
    assert [line for line in lines if line.startswith("#")] == [
        "# tiny",
        "## forced, plain, context 1024",
        "## greedy, plain, context 1024",
    ]
    assert "| series | 4 drafts, 3% | 4 drafts, 10% | 6 drafts, 3% | 6 drafts, 10% |" in lines
    assert "| `quest` | 2.50 | 2.50 | 2.50 | 2.50 |" in lines
    assert "| `everything` | 3.50 |  |  |  |" in lines
    assert "| `quest` | 4.50 | 4.50 | 4.50 | 4.50 |" in lines


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int | str | None:
    """The command in this process, on the oracle's kernels; its exit code."""
    monkeypatch.setattr(sys, "argv", ["specattn-bench", "acceptance", *arguments])
    monkeypatch.setattr(acceptance, "load_kernels", ReferenceKernels)
    try:
        cli.main()
    except SystemExit as stop:
        return stop.code
    return 0


def test_a_tiny_run_prints_writes_and_draws(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    save_checkpoint(tmp_path)
    (tmp_path / "a.py").write_text(SOURCE)
    sizes = ("--context", "64", "--budget", "0.1", "--budget", "0.2", "--draft-len", "2", "--draft-len", "3")
    usual = ("--usual-budget", "0.1", "--usual-drafts", "2", "--rounds", "2", "--passages", "2")
    series = ("--series", "streaming", "--series", "hybrid")
    outputs = ("--json", str(tmp_path / "out.json"), "--plot", str(tmp_path / "out.png"))
    outputs += ("--resume", str(tmp_path / "runs.jsonl"))
    source = ("--model", str(tmp_path), "--text", str(tmp_path / "a.py"))
    assert run(monkeypatch, *source, *sizes, *usual, *series, *outputs) == 0
    shown = capsys.readouterr().out
    assert "2 passages a set and context, 2 rounds each" in shown
    assert "every key selected: tokens a round, of 3: 3.000 (wanted all accepted): met" in shown
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    answer = json.loads((tmp_path / "out.json").read_text())
    assert len(answer["passages"]) == 4
    cells = [(one["mode"], one["text"], one["series"], one["budget"], one["draft_len"]) for one in answer["results"]]
    assert len(cells) == len(set(cells))
    forced = [cell for cell in cells if cell[0] == "forced"]
    # Streaming and hybrid at the usual draft length or the usual budget, everything at the usual budget; both sets.
    assert len(forced) == 2 * (2 * 3 + 2)
    assert {cell[2:] for cell in cells if cell[0] == "sampled"} == {
        (series, 0.1, 2) for series in ("streaming", "hybrid", EVERYTHING)
    }
    # What is kept is not run again: a journal cut short costs the runs it lost, and the answer is the same.
    journal = tmp_path / "runs.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    assert len(lines) == 3 * 2 + 3  # three series with two draft lengths, and generated with the usual one
    journal.write_bytes(b"".join(lines[:-1]) + lines[-1][:20])
    assert run(monkeypatch, *source, *sizes, *usual, *series, *outputs) == 0
    assert json.loads((tmp_path / "out.json").read_text())["results"] == answer["results"]
    again = journal.read_bytes().splitlines(keepends=True)
    assert (again[: len(lines) - 1], again[-1]) == (lines[:-1], lines[-1])
    assert run(monkeypatch, *source, *sizes, *usual, *series, "--mode", "greedy", *outputs) == 0
    assert {one["mode"] for one in json.loads((tmp_path / "out.json").read_text())["results"]} == {"greedy"}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--text", "absent.txt"], "absent.txt: no such file"),
        (["--model", "absent"], "absent: no such folder"),
        (["--series", "dense"], "'dense' is not one of"),
        (["--budget", "0"], "0.0 is not in the range"),
        (["--usual-budget", "0.5", "--usual-drafts", "9"], "no case left"),
        (["--plot", "out.txt"], "must end in .png"),
    ],
)
def test_bad_input_is_one_line_and_code_2(
    arguments: list[str], says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, *arguments) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def test_prompts_beyond_the_models_positions_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    save_checkpoint(tmp_path)
    (tmp_path / "a.py").write_text(SOURCE * 3)
    assert run(monkeypatch, "--model", str(tmp_path), "--text", str(tmp_path / "a.py"), "--context", "600") == 2
    assert "exceed the model's 256 positions" in capsys.readouterr().err


def test_guided_series_are_those_with_scores() -> None:
    assert set(acceptance_report.GUIDED) >= {"vegas", "pillar", "reference", "hybrid", "hybrid-pillar"}
    assert not set(acceptance_report.GUIDED) & {"streaming", "quest", "random", EVERYTHING}
    assert set(acceptance_report.GUIDED) < set(SERIES)
