"""The GPU campaign rehearsed: cut at any moment, gone on with, and never asked twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import campaign, child, journal, model, peers, summary
from benchmarks.gpu.flashinfer_peers import page_tables
from benchmarks.gpu.journal import Journal
from benchmarks.gpu.rounds import Round, Shape, drawn_llama
from benchmarks.gpu.session import NOT_A_GPU, Session, Step, Steps
from benchmarks.gpu.sizes import PAGE_SIZE, rehearsed
from specattn_codegen import build, space
from specattn_codegen.cost_model.calibration import Observation, fit, rank_correlation
from specattn_codegen.errors import SpecError
from specattn_codegen.policy import TopK
from specattn_codegen.processors import cpu_info
from specattn_codegen.proof.problems import timing_problem
from specattn_codegen.proof.prove import launch
from specattn_codegen.spec import KernelSpec, ScoreSpec, Workload
from specattn_codegen.tuning.jobs import render_for
from specattn_runtime.dispatch import load_kernels

COMMAND = (sys.executable, "-m", "benchmarks.gpu")
PATIENCE_S = 1500.0  # a machine under load takes minutes for what takes half of one
CPU = cpu_info.detect(measure=False)


def command(out: Path, *arguments: str) -> list[str]:
    return [*COMMAND, "--out", str(out), "--minutes", "25", "--rehearse", *arguments]


def keys(folder: Path, status: str) -> Counter[str]:
    return Counter(fact.key for fact in Journal(folder=folder, revision="").facts() if fact.status == status)


def wait_for(folder: Path, key: str) -> None:
    end = time.monotonic() + PATIENCE_S
    while keys(folder, "started")[key] == 0:
        assert time.monotonic() < end, f"{key} never began"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def cut_and_finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A rehearsal killed within a step of its second stage, then run to its end."""
    out = tmp_path_factory.mktemp("campaign") / "out"
    process = subprocess.Popen(command(out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(out, "correctness/tiny/bfloat16")
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = (out / journal.JOURNAL).read_bytes()
    ended = subprocess.run(command(out), capture_output=True, text=True, check=False, timeout=PATIENCE_S)
    assert ended.returncode == 0, ended.stderr
    assert "every step is settled" in ended.stdout, ended.stdout
    assert (out / journal.JOURNAL).read_bytes().startswith(before)  # what asked died with the command
    return out


def test_a_campaign_cut_by_kill_9_goes_on_and_asks_nothing_twice(cut_and_finished: Path) -> None:
    done, started = keys(cut_and_finished, "done"), keys(cut_and_finished, "started")
    assert keys(cut_and_finished, "failed") == {}
    assert set(done.values()) == {1}
    assert {key.split("/")[0] for key in done} == {"campaign", *campaign.STAGES}
    assert started.pop("correctness/tiny/bfloat16") == 2  # it was under way
    assert set(started.values()) == {1}


def test_every_rehearsed_answer_says_that_it_is_no_gpus(cut_and_finished: Path) -> None:
    answers = Journal(folder=cut_and_finished, revision="").answers()
    notes = {key: answer.get("note") for key, answer in answers.items() if key != "campaign"}
    assert {key for key, note in notes.items() if note != NOT_A_GPU} == {key for key in notes if key[:6] == "model/"}
    assert all(note == model.MADE_UP for key, note in notes.items() if key[:6] == "model/")


def test_what_a_rehearsal_can_find_out_it_finds(cut_and_finished: Path) -> None:
    answers: dict[str, Any] = {**Journal(folder=cut_and_finished, revision="").answers()}
    proved = answers["correctness/tiny/bfloat16"]
    assert (proved["wrong"], proved["not_served"], proved["proofs"]) == ([], [], 1)
    assert answers["correctness/memcheck"]["passed"] is True
    assert answers["graphs/reference"]["same_bits"] is True
    assert answers["ceilings/read"]["gbs"] > 0
    (tuned,) = (answer for key, answer in answers.items() if key.startswith("tuning/"))
    assert [winner["chosen_by"] for winner in tuned["winners"]] == ["measured"]
    series = answers["peers/verify/b2-q3-n130"]["series"]
    assert {"no scores", "reference", "matmuls, with scores"} <= series.keys()
    assert all(("timing" in one) != ("refused" in one) for one in series.values())
    rounds = answers["rounds/reference/b2-n90"]["timings"]
    assert rounds.keys() == {"draft", "verify", "select", "dense", "whole"}
    assert all(timing["median_us"] > 0 for timing in rounds.values())


def test_the_archive_holds_everything_and_another_folder_goes_on_from_it(
    cut_and_finished: Path, tmp_path: Path
) -> None:
    archive = cut_and_finished / journal.ARCHIVE
    with tarfile.open(archive) as packed:
        names = set(packed.getnames())
    files = {str(path.relative_to(cut_and_finished)) for path in cut_and_finished.rglob("*") if path.is_file()}
    assert names == files - {journal.ARCHIVE}
    assert {"journal.jsonl", "trials.jsonl", "packs/cpu/q4-kv2-d16.json"} <= names
    assert len(files) <= 8

    more = tmp_path / "more"
    asked = campaign.Asked(out=more, minutes=1e-9, stages=campaign.STAGES, resume=archive, is_rehearsal=True)
    assert not campaign.run(asked)  # no time to ask anything, and nothing is left to be asked
    assert (more / journal.JOURNAL).read_bytes() == (cut_and_finished / journal.JOURNAL).read_bytes()
    book = Journal(folder=more, revision="another")
    assert all(book.is_settled(key) for key in keys(cut_and_finished, "started"))


def test_the_summary_has_a_line_for_every_step(cut_and_finished: Path) -> None:
    text = summary.text(cut_and_finished)
    for key in keys(cut_and_finished, "done"):
        assert f"{key} " in text
    assert "0 failed" in text


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--stages", "ceilings,dinner"], "--stages ceilings,dinner: must be of ceilings,"),
        (["--minutes", "0"], "--minutes 0: must be above 0"),
        (["--resume", __file__], "not an archive of a campaign"),
        (["--out", "/proc/nowhere"], "/proc/nowhere: cannot be written"),
    ],
)
def test_bad_input_is_one_clear_line(tmp_path: Path, arguments: list[str], says: str) -> None:
    ended = subprocess.run(command(tmp_path, *arguments), capture_output=True, text=True, check=False, timeout=60)
    assert ended.returncode == 2
    assert says in ended.stderr
    assert ended.stderr.count("\n") == 1


def test_rehearsals_and_measurements_do_not_mix(tmp_path: Path) -> None:
    Journal(folder=tmp_path, revision="a").done(campaign.KIND, 0.0, {"rehearsal": False})
    asked = campaign.Asked(out=tmp_path, minutes=1, stages=["model"], resume=None, is_rehearsal=True)
    with pytest.raises(SpecError, match="holds a GPU's results, which do not mix"):
        campaign.run(asked)


# -- the journal -----------------------------------------------------------------------------------------------------


def test_a_failed_step_is_asked_again_only_with_other_sources(tmp_path: Path) -> None:
    old, new = Journal(folder=tmp_path, revision="old"), Journal(folder=tmp_path, revision="new")
    old.started("a")
    old.failed("a", 1.0, "Boom")
    assert old.is_settled("a")
    assert not new.is_settled("a")
    new.started("a")
    new.done("a", 1.0, {"x": 1})
    assert old.is_settled("a")
    assert new.answers() == {"a": {"x": 1}}


def ask(folder: Path, steps: list[Step], left: float = 60.0) -> bool:
    session = Session.open(folder, "sources", rehearsal=True)

    def stage(_: Session) -> Steps:
        yield from steps

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(child, "STAGES", {"only": stage})
        return child.run_stages(session, child.Clock(time.time() + left), ["only"])


def test_a_step_that_fails_or_takes_its_process_along_does_not_stop_the_others(tmp_path: Path) -> None:
    def fail() -> journal.Answer:
        raise RuntimeError("no such luck")

    book = Journal(folder=tmp_path, revision="sources")
    for _ in range(journal.MOST_ATTEMPTS):
        book.started("deadly")
    steps = [
        Step(key="failing", seconds=1, run=fail),
        Step(key="deadly", seconds=1, run=fail),
        Step(key="good", seconds=1, run=lambda: {"found": 7}),
    ]
    assert ask(tmp_path, steps)
    assert book.answers() == {"good": {"found": 7}}
    errors = {fact.key: str(fact.answer["error"]) for fact in book.facts() if fact.status == "failed"}
    assert "RuntimeError: no such luck" in errors["failing"]
    assert "its process ended 2 times" in errors["deadly"]


def test_what_there_is_no_time_for_is_left_for_the_next_call(tmp_path: Path) -> None:
    long, short = (Step(key=f"{s}", seconds=s, run=dict) for s in (50.0, 5.0))
    assert not ask(tmp_path, [long, short], left=20.0)
    book = Journal(folder=tmp_path, revision="sources")
    assert set(book.answers()) == {"5.0"}
    assert ask(tmp_path, [long, short], left=70.0)
    assert set(book.answers()) == {"5.0", "50.0"}


# -- what is asked ---------------------------------------------------------------------------------------------------


def test_a_round_that_drafts_with_every_key_accepts_every_draft() -> None:
    size, draft_len = rehearsed().model, 3
    drawn = drawn_llama(size, 2, 64, torch.float32, "cpu")
    kernels = load_kernels(size.heads, device="cpu", dtype=torch.float32, page_size=PAGE_SIZE)
    shape = Shape(batch=2, kv_len=40, draft_len=draft_len, layers=2, caches=2, score=ScoreSpec(normaliser="reference"))
    with torch.inference_mode():
        held = Round(drawn, kernels, shape, TopK(ratio=1.0))
        held.place([40, 23], [5, 9])
        held.whole()  # drafts without a selection, as there is none yet
        held.whole()
        assert held.selection.counts.tolist() == [[[40, 40], [23, 23]]] * 2
        assert held.accepted.tolist() == [draft_len, draft_len]
        assert torch.equal(held.tokens[:, 1:], held.targets[:, :-1])
        verified = held.targets[:, 0].clone()
        held.dense_step()
        assert torch.equal(held.targets[:, 0], verified)
        kept = held.state
        held.place([11, 12], [1, 2])
        held.whole()
        held.restore(kept)
        assert all(torch.equal(*pair) for pair in zip(kept, held.state, strict=True))


@pytest.mark.parametrize("block", [1, PAGE_SIZE])
def test_gathering_for_torch_gives_what_sparse_attention_gives(block: int) -> None:
    heads = rehearsed().model.heads
    spec = KernelSpec(op="sparse_attention", heads=heads, selection="kv_head")
    problem = timing_problem(
        spec, Workload(batch=2, q_len=1, kv_len=97, budget=32), page_size=PAGE_SIZE, seed=2, device="cpu", block=block
    )
    kernel = build.load(render_for(spec, space.default_plan(spec, CPU, "cpu"), CPU))
    (call,) = peers.calls(kernel, [problem])
    launch(kernel, call, "cpu")
    gathered = peers.gathered(problem, heads)()
    assert isinstance(gathered, torch.Tensor)
    torch.testing.assert_close(gathered.flatten(0, 2).view_as(call.out), call.out)


def test_flashinfer_is_given_our_pages() -> None:
    spec = KernelSpec(op="verify_attention", heads=rehearsed().model.heads)
    problem = timing_problem(spec, Workload(batch=3, q_len=2, kv_len=37), page_size=16, seed=2, device="cpu")
    starts, pages, last = page_tables(problem)
    assert starts.tolist() == [0, 3, 6, 9]
    assert pages.tolist() == problem.page_table.flatten().tolist()
    assert last.tolist() == [5, 5, 5]


# -- the model against measurements ----------------------------------------------------------------------------------


def test_ranks_correlate_as_spearman_has_it() -> None:
    assert rank_correlation([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1.0)
    assert rank_correlation([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1.0)
    # 1 - 6 * (1 + 1 + 0 + 1 + 1) / (5 * 24)
    assert rank_correlation([1, 2, 3, 4, 5], [2, 1, 3, 5, 4]) == pytest.approx(0.8)
    assert rank_correlation([1, 1, 2], [5, 5, 7]) == pytest.approx(1.0)
    assert rank_correlation([1, 1, 1], [5, 6, 7]) == 0.0


def test_calibration_finds_what_slows_a_device_down() -> None:
    found = model.made_up()
    factors = fit(found)
    assert factors["memory"] == pytest.approx(4 / 3, rel=0.1)
    assert factors["launch"] > 1.3
    plain = [abs(one.predicted_us({}) / one.measured_us - 1) for one in found]
    scaled = [abs(one.predicted_us(factors) / one.measured_us - 1) for one in found]
    assert sum(scaled) < 0.3 * sum(plain)


def test_calibration_believes_the_model_where_nothing_was_measured() -> None:
    assert fit([]) == {}
    launches = [Observation(case="small", measured_us=9.0, terms={"launch": 3.0, "l2": 0.0})] * 5
    factors = fit(launches)
    assert factors["l2"] == pytest.approx(1.0)
    assert 2.5 < factors["launch"] < 3.0


def test_importing_what_runs_on_a_bare_machine_takes_few_packages() -> None:
    absent = ("optuna", "click", "rich", "matplotlib", "safetensors", "sqlalchemy", "tilelang", "transformers")
    without = f"import sys; sys.modules.update(dict.fromkeys({absent})); import benchmarks.gpu.child"
    subprocess.run([sys.executable, "-c", without], check=True)
    light = "import sys, benchmarks.gpu.campaign; print('torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", light], capture_output=True, text=True, check=True)
    assert json.loads(shown.stdout.lower()) is False
