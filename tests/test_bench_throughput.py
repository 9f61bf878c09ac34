"""specattn-bench throughput: the command as people run it, given acceptance, and texts that are those of generate."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import pytest

from specattn_bench import cli, throughput, throughput_report
from specattn_bench.throughput_measured import Case, Decoding, Played, Step, decodings, law_of, play_in_turns
from specattn_bench.throughput_models import Prompts, Subject, drawn_prompts, prefilled
from specattn_bench.throughput_peer import GENERATED, PlainGenerate, in_transformers
from specattn_bench.throughput_report import DENSE, GENERATE, Line, line_of, standings
from specattn_codegen.errors import SpecError
from specattn_runtime.decoding.decode_spec import DecodeSpec
from specattn_runtime.decoding.draft_length import expected_tokens
from specattn_runtime.decoding.generation import RequestResult
from specattn_runtime.decoding.presets import PRESETS
from specattn_runtime.decoding.reference_kernels import ReferenceKernels
from specattn_runtime.model.llama import Llama
from tiny_models import TRAINED, one_thread, save_checkpoint, wavy_llama  # noqa: F401 - a fixture that applies by being here

TEXT = (TRAINED / "heldout.txt").read_bytes()
CASE = Case(model="m", heads="q8-kv8-d32", dtype="float32", batch=4, context=64)


def spec_of(preset: str) -> DecodeSpec:
    return DecodeSpec(preset=PRESETS[preset], draft_len=3, budget=0.5, max_new_tokens=25)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int | str | None:
    """The command in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", ["specattn-bench", "throughput", *arguments])
    try:
        cli.main()
    except SystemExit as stop:
        return stop.code
    return 0


def test_a_checkpoint_is_timed_beside_dense_steps_and_generate(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    texts = ("--model", str(TRAINED), "--text", argparse.__file__)
    few = ("--batch", "3", "--context", "100", "--dtype", "float32", "--preset", "vegas", "--preset", "streaming")
    written, drawn = tmp_path / "answer.json", tmp_path / "answer.png"
    places = ("--json", str(written), "--plot", str(drawn))
    assert run(monkeypatch, *texts, *few, *places, "--draft-len", "2", "--seconds", "0.01", "--threads", "1") == 0
    assert drawn.read_bytes().startswith(b"\x89PNG")
    answer = json.loads(written.read_text())
    assert (answer["question"], answer["label"], answer["accepted"]) == (
        "throughput",
        "measured",
        "as the texts gave it",
    )
    dense, vegas, streaming, generated = answer["results"]
    assert [one["series"] for one in answer["results"]] == [DENSE, "vegas", "streaming", GENERATE]
    assert {(one["batch"], one["context"], one["heads"]) for one in answer["results"]} == {(3, 100, "q8-kv2-d32")}
    for one in (dense, vegas, streaming, generated):
        rate = 3 * one["tokens_per_round"] / one["median_us"] * 1e6
        assert one["tokens_per_second"] == pytest.approx(rate, rel=1e-2)
        assert one["times_dense"] == pytest.approx(rate / dense["tokens_per_second"], rel=1e-2)
        # Drafts, verifications and generate itself all give the text of dense decoding.
        assert one["margins_where_requests_part_from_dense"] == []
        assert one["compared_tokens"] >= 2 * 3 * 6
    for one in (vegas, streaming):
        by_text = one["tokens_per_round_by_text"]
        assert list(by_text) == ["plain", "long-range"]
        assert min(by_text.values()) - 1e-3 < one["tokens_per_round"] < max(by_text.values()) + 1e-3
        costs = sum(one[f"{part}_us"] for part in ("draft", "verify", "select"))
        assert one["times_dense_if_all_drafts_held"] == pytest.approx(3 * dense["median_us"] / costs, rel=1e-2)
        by_formula = one["times_dense_if_all_drafts_held"] * one["tokens_per_round"] / 3
        assert one["times_dense_by_formula"] == pytest.approx(by_formula, rel=1e-2)
    assert vegas["scores_us"] == pytest.approx(vegas["verify_us"] - streaming["verify_us"], abs=0.2)


def test_drawn_weights_take_a_given_acceptance(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    save_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    written = tmp_path / "answer.json"
    few = ("--batch", "1", "--context", "64", "--dtype", "bfloat16", "--preset", "quest", "--preset", "streaming")
    drawn = ("--drawn", str(tmp_path), "--accepted", "4", "--draft-len", "4")
    assert run(monkeypatch, *drawn, *few, "--json", str(written), "--seconds", "0.01") == 0
    answer = json.loads(written.read_text())
    assert answer["accepted"] == 4.0
    by_series = {one["series"]: one for one in answer["results"]}
    assert by_series["quest"]["model"] == f"{tmp_path.name}, drawn weights"
    assert by_series["quest"]["tokens_per_round"] == by_series["streaming"]["tokens_per_round"] == 5.0
    assert "compared_tokens" not in by_series["quest"]
    assert by_series["quest"]["scores_and_selection_share"] is None
    assert by_series["streaming"]["scores_us"] == 0.0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--drawn", str(TRAINED)], "name a number with --accepted"),
        (["--accepted", "7"], "--accepted 7: must be 0 to 6"),
        (
            ["--model", str(TRAINED), "--context", "4090"],
            "--context 4090: with 43 tokens decoded after it exceeds the 4096 positions",
        ),
        (["--preset", "vegs"], "did you mean vegas?"),
        (["--budget", "1.5"], "budget=1.5: must be above 0 and at most 1"),
        (["--draft-len", "0"], "draft_len=0"),
        (["--seconds", "0"], "--seconds 0: must be above 0"),
        (["--model", "absent"], "absent: no config.json"),
        (["--plot", "x.gif"], "must end in .png"),
    ],
)
def test_bad_options_are_one_clear_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    assert run(monkeypatch, *arguments) == 2
    shown = capsys.readouterr()
    assert (shown.out, shown.err.count("\n")) == ("", 1)
    assert says in shown.err


def test_no_checkpoint_at_all_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(throughput, "ASSETS", tmp_path)
    assert run(monkeypatch) == 2
    assert f"--model: {tmp_path} has no checkpoints" in capsys.readouterr().err


@pytest.mark.parametrize("accepted", [0.0, 1.3, 5.2, 6.0])
def test_a_law_lets_as_many_drafts_hold_on_average(accepted: float) -> None:
    law = law_of(accepted, 6)
    assert expected_tokens(law.rate, 6) - 1 == pytest.approx(accepted, abs=1e-9)
    counts = [law.held(6) for _ in range(2000)]
    assert set(counts) <= set(range(7))
    assert sum(counts) / len(counts) == pytest.approx(accepted, abs=4 * 6 / 2000**0.5 / 2)
    with pytest.raises(SpecError, match=r"--accepted 6\.5: must be 0 to 6"):
        law_of(6.5, 6)


def contenders_of(llama: Llama, prompts: Prompts, *presets: str, accepted: float | None = None) -> list[Decoding]:
    law = None if accepted is None else law_of(accepted, 3)
    return decodings(llama, ReferenceKernels(llama.heads), prompts, [spec_of(name) for name in presets], 2, law)


def test_every_turn_starts_from_the_same_prompts() -> None:
    """Contenders share a cache, and one whose drafts hold as given leaves other keys in it than one that verifies."""
    llama = wavy_llama()
    prompts = drawn_prompts(llama, 40)
    (alone,) = contenders_of(llama, prompts, "vegas")
    wanted = [result.tokens for result in alone.play([0, 1]).results]
    given, _, quest = contenders_of(llama, prompts, "vegas", DENSE, "quest", accepted=3.0)
    first, again = given.play([0, 1]), given.play([0, 1])
    assert [step.tokens for step in first.steps] == [4.0] * 6
    assert [result.tokens for result in first.results] == [result.tokens for result in again.results]
    assert quest.play([1, 0]).results[1].tokens == quest.play([0, 1]).results[0].tokens
    assert [result.tokens for result in alone.play([0, 1]).results] == wanted
    assert [result.tokens for result in alone.play([1, 0]).results] == wanted[::-1]


def test_generate_goes_on_from_prefilled_prompts_as_dense_steps_do() -> None:
    subject = Subject(folder=TRAINED, drawn=False)
    llama = subject.llama("float32")
    kernels = ReferenceKernels(llama.heads)
    texts = [list(TEXT[start : start + 90]) for start in (0, 40)]
    prompts = prefilled(llama, kernels, texts, ["plain", "plain"])
    (dense,) = contenders_of(llama, prompts, DENSE)
    ours = dense.play([0, 1]).results
    theirs = PlainGenerate(model=in_transformers(subject, "float32"), prompts=prompts).play([0, 1])
    assert [one.tokens for one in theirs.results] == [one.tokens[: GENERATED + 1] for one in ours]
    assert len(theirs.steps) == GENERATED


class Counting:
    """A contender that notes whose turn it is."""

    def __init__(self, name: str, log: list[tuple[str, tuple[int, ...], int | None]]) -> None:
        self.name, self._log = name, log

    def play(self, chosen: list[int], steps: int | None = None) -> Played:
        self._log.append((self.name, tuple(chosen), steps))
        return Played(steps=[], kinds=[], results=[])


def test_contenders_take_turns_over_the_prompts() -> None:
    log: list[tuple[str, tuple[int, ...], int | None]] = []
    ticks = iter(range(100))
    pair = [Counting("one", log), Counting("other", log)]
    played = play_in_turns(pair, 3, 2, 2.0, clock=lambda: next(ticks))  # type: ignore[arg-type]
    assert log[:2] == [("one", (0, 1), 1), ("other", (0, 1), 1)]  # to build kernels
    assert [entry[:2] for entry in log[2:8]] == [
        (name, chosen) for chosen in ((0, 1), (2, 0), (1, 2)) for name in ("one", "other")
    ]
    assert len(played["one"]) == len(played["other"]) >= 2


def result_of(tokens: str, margin: float = 0.5) -> RequestResult:
    return RequestResult(tokens=tuple(tokens.encode()), margins=(margin,) * len(tokens), accepted=(), drafted=())


def test_texts_are_compared_as_far_as_both_go() -> None:
    dense = [Played(steps=[], kinds=["a", "b"], results=[result_of("abcd", 0.25), result_of("abcd")])]
    found = throughput_report.parted(
        [Played(steps=[], kinds=["a", "b"], results=[result_of("abXdef"), result_of("ab")])], dense
    )
    assert (found.tokens, found.requests, found.margins) == (4 + 2, 2, [0.25])


def line(series: str, draft_len: int, tokens: float, seconds: float, **phases: float) -> Line:
    steps = [Step(seconds=seconds, tokens=tokens, phases=phases)] * 3
    return line_of(CASE, series, draft_len, [Played(steps=steps, kinds=[], results=[])], None)


def test_the_cost_formula() -> None:
    found = standings(
        [
            line(DENSE, 0, 1.0, 0.060, draft=0.0, verify=0.060, select=0.0),
            line("streaming", 6, 5.0, 0.170, draft=0.060, verify=0.098, select=0.002),
            line("vegas", 6, 6.0, 0.165, draft=0.060, verify=0.100, select=0.001),
            line(GENERATE, 0, 1.0, 0.300),
        ]
    )
    vegas = found[2]
    assert vegas.line.rate == pytest.approx(4 * 6 / 0.165)
    assert vegas.times_dense == pytest.approx(6 * 0.060 / 0.165)
    assert vegas.times_generate == pytest.approx(6 * 0.300 / 0.165)
    assert vegas.formula == pytest.approx(6 * 0.060 / 0.161)
    assert vegas.perfect == pytest.approx(7 * 0.060 / 0.161)
    assert vegas.overhead == pytest.approx((0.002 + 0.001) / 0.165)
    assert vegas.line.phases["other"] == pytest.approx(0.004)
    # A row of verification costs (100 - 60) / 6 ms; nearly all drafts hold, so that more of them pay.
    rate = law_of(5.0, 6).rate
    assert vegas.best_len is not None
    speeds = [
        expected_tokens(rate, drafts) * 0.060 / (0.010 * drafts + 0.061 + drafts * 0.040 / 6) for drafts in range(1, 17)
    ]
    assert vegas.best_len == speeds.index(max(speeds)) + 1 > 6
    assert vegas.best == pytest.approx(max(speeds))
    assert (found[0].formula, found[0].overhead, found[3].times_dense) == (None, None, pytest.approx(0.2))


def test_tokens_are_told_apart_by_kind_of_text() -> None:
    accepted = [(2, 3), (0, 1), (6, 6)]
    results = [RequestResult(tokens=(1,), margins=(0.1,), accepted=each, drafted=(6, 6)) for each in accepted]
    turn = Played(steps=[], kinds=["plain", "long-range", "plain"], results=results)
    assert throughput_report.tokens_by_kind([turn, turn]) == {"plain": 5.25, "long-range": 1.5}
