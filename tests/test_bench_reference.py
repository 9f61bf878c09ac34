"""specattn-bench reference: its methods beside the oracle's scores, what it records, the command as people run it."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch

from specattn_bench import cli, reference, reference_report
from specattn_bench.known_text import Passages
from specattn_bench.reference_methods import METHODS, RowLses, Seen, exact
from specattn_bench.reference_study import Study
from specattn_codegen.proof.reference import reduce_scores, scored_rows
from specattn_codegen.spec import ScoreSpec
from specattn_runtime.decoding.reference_kernels import ReferenceKernels
from tiny_models import TRAINED, one_thread, save_checkpoint, wavy_llama  # noqa: F401 - a fixture that applies by being here

KEPT = Path(__file__).parent.parent / "benchmarks" / "results" / "reference" / "tiny-bytes-llama.json"


def seen_of(rows: int = 4, prefix: int = 2100) -> Seen:
    """Peaked logits over three splits of keys; the draft steps fell short by the same 0.5 everywhere, also before."""
    generator = torch.Generator().manual_seed(rows)
    logits = 3.0 * torch.randn(rows, 6, prefix, generator=generator, dtype=torch.float64)
    lse = logits.logsumexp(dim=2)
    lses = RowLses(exact=lse, drafted=lse[:-1] - 0.5)
    return Seen(logits=logits, now=lses, past=lses, kv_heads=2)


@pytest.mark.parametrize(("name", "rows"), [("ends", "ends"), ("last", "last"), ("exact", "all")])
def test_exact_methods_are_the_oracles_scores(name: str, rows: str) -> None:
    seen, spec = seen_of(), ScoreSpec(rows=rows)  # pyright: ignore[reportArgumentType]
    weights = (seen.logits - seen.now.exact[..., None]).exp()[scored_rows(4, spec)]
    found = (METHODS[name].scores or exact)(seen)
    assert torch.allclose(found, reduce_scores(weights, spec, 2), rtol=1e-12, atol=0)


def scores_by(name: str, seen: Seen) -> torch.Tensor:
    scores = METHODS[name].scores
    assert scores is not None
    return scores(seen)


def test_dumps_are_off_by_no_more_than_their_codes() -> None:
    seen = seen_of()
    truth, off = exact(seen), {name: scores_by(name, seen) - exact(seen) for name in ("dump-linear", "dump-log")}
    assert 0 < off["dump-linear"].abs().max() <= 1 / 510  # half a code of a weight of at most 1
    half_step = 16 * math.log(2.0) / 254 / 2
    assert bool((off["dump-log"].abs() <= math.expm1(half_step) * truth + 2.0**-16).all())
    assert off["dump-log"].abs().max() > 0
    assert off["dump-log"].abs().sum() < off["dump-linear"].abs().sum() / 2


def test_references_without_an_error_give_the_exact_scores_of_the_drafted_rows() -> None:
    seen = seen_of()
    weights = (seen.logits - seen.now.exact[..., None]).exp()
    drafted_rows = weights[:-1].unflatten(1, (2, -1)).mean(dim=(0, 2))
    assert torch.allclose(scores_by("dropped", seen), math.exp(0.5) * drafted_rows)
    # The correction is the 0.5 that was missing; the last row is another row's business.
    for name, stand_in in (("neighbour-corrected", seen.now.exact[-2]), ("corrected", seen.now.exact[:-1].amax(dim=0))):
        last_row = (seen.logits[-1] - stand_in[:, None]).exp().unflatten(0, (2, -1)).mean(dim=1)
        assert torch.allclose(scores_by(name, seen), 0.75 * drafted_rows + 0.25 * last_row)


def test_a_capped_weight_is_the_neighbours_up_to_a_64th() -> None:
    seen = seen_of()
    capped, plain = scores_by("capped", seen), scores_by("neighbour", seen)
    assert bool((capped <= plain.clamp_max(1 / 64) + 1e-15).all())
    assert bool((capped == plain).any())
    assert bool((capped < plain).any())


def test_before_any_draft_references_are_exact() -> None:
    seen = seen_of()
    fresh = Seen(logits=seen.logits, now=RowLses(exact=seen.now.exact, drafted=None), past=None, kv_heads=2)
    for method in METHODS.values():
        if method.preset == "reference" and method.scores is not None:
            assert torch.equal(method.scores(fresh), exact(fresh))


@pytest.fixture(scope="module")
def study() -> Study:
    model = wavy_llama()
    texts = torch.randint(256, (3, 60), generator=torch.Generator().manual_seed(0))
    passages = Passages(texts=texts, contexts=(40, 25, 51))
    return Study(model, ReferenceKernels(model.config.heads), passages, draft_len=3, rounds=2)


@pytest.mark.parametrize("name", list(METHODS))
def test_with_every_key_selected_nothing_is_lost(study: Study, name: str) -> None:
    recorded = study.run(METHODS[name], 1.0)
    assert recorded.overlap.shape == (2, 2, 3, 2)  # rounds, layers, passages, KV heads
    assert recorded.coming.shape == (1, 2, 3, 2)
    for share in (recorded.overlap, recorded.mass, recorded.coming):
        assert torch.allclose(share.double(), torch.ones_like(share, dtype=torch.float64))
    assert torch.allclose(recorded.accepted, torch.full_like(recorded.accepted, 3.0))
    assert torch.equal(recorded.matched, torch.full_like(recorded.matched, 3.0))


def test_what_a_few_keys_lose(study: Study) -> None:
    found = {name: study.run(METHODS[name], 0.15) for name in ("exact", "reference", "streaming", "dump-log")}
    for name, recorded in found.items():
        assert bool((recorded.mass <= 1 + 1e-9).all())
        assert bool((recorded.overlap == 1).all()) == (name == "exact")
        assert (recorded.short is None) == (name != "reference")
        assert (recorded.error is None) == (name != "dump-log")
        assert recorded.accepted.mean() < 3.0
    assert found["streaming"].mass.mean() < found["reference"].mass.mean()
    exact_run = study.run(METHODS["exact"], 0.15)  # every run starts at the same place
    assert torch.equal(exact_run.coming, found["exact"].coming)
    assert torch.equal(exact_run.accepted, found["exact"].accepted)


def test_summaries_are_means_over_passages_beside_exact() -> None:
    mean = reference_report.over_passages(torch.tensor([0.5, 0.7, 0.6]), torch.tensor([0.9, 1.0, 0.8]))
    assert mean.value == pytest.approx(0.6)
    assert mean.error == pytest.approx(0.1 / math.sqrt(3))  # of -0.4, -0.3 and -0.2
    parts = reference_report.by_shortfall(torch.tensor([-2.0, 0.5, 1.0, 9.0]), torch.tensor([0.9, 0.7, 0.6, 0.1]))
    assert [(part.above, part.share) for part in parts] == [(0.0, 0.5), (1.0, 0.25), (2.0, 0.0), (4.0, 0.25)]
    assert [part.overlap for part in parts] == [pytest.approx(0.8), pytest.approx(0.6), None, pytest.approx(0.1)]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int | str | None:
    """The command in this process, on the oracle's kernels; its exit code."""
    monkeypatch.setattr(sys, "argv", ["specattn-bench", "reference", *arguments])
    monkeypatch.setattr(reference, "load_kernels", ReferenceKernels)
    try:
        cli.main()
    except SystemExit as stop:
        return stop.code
    return 0


def test_a_tiny_run_prints_writes_and_draws(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    save_checkpoint(tmp_path)
    for number in range(3):
        (tmp_path / f"{number}.txt").write_bytes(bytes((7 * i * i + number) % 256 for i in range(90 if number else 30)))
    texts = [part for number in range(3) for part in ("--text", str(tmp_path / f"{number}.txt"))]
    sizes = ("--context", "64", "--draft-len", "2", "--rounds", "2", "--budget", "0.1")
    outputs = ("--json", str(tmp_path / "out.json"), "--plot", str(tmp_path / "out.png"))
    assert run(monkeypatch, "--model", str(tmp_path), *texts, *sizes, "--method", "reference", *outputs) == 0
    assert "2 passages, 2 drafts, 2 rounds each" in capsys.readouterr().out
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    answer = json.loads((tmp_path / "out.json").read_text())
    assert [(result["method"], result["budget"]) for result in answer["results"]] == [
        ("exact", 0.1),
        ("reference", 0.1),
    ]
    assert [passage["context"] for passage in answer["passages"]] == [64, 64]  # the first file is too short
    assert answer["results"][0]["overlap"] == {"value": 1.0, "error": 0.0}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--text", "absent.txt"], "absent.txt: no such file"),
        (["--context", "9000000"], "error: 0 of "),
        (["--rounds", "1"], "1 is not in the range"),
        (["--method", "exactly"], "'exactly' is not one of"),
        (["--model", "absent"], "absent: no such folder"),
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


def test_a_checkpoint_without_held_out_text_asks_for_some(tmp_path: Path) -> None:
    with pytest.raises(reference.SpecError, match="name some with --text"):
        reference.held_out(tmp_path)


def test_the_kept_results_are_of_every_method() -> None:
    answer = json.loads(KEPT.read_text())
    assert answer["model"] == TRAINED.name
    found = {(result["method"], result["budget"]) for result in answer["results"]}
    assert found == {(method, budget) for method in METHODS for budget in (0.02, 0.03, 0.05, 0.07, 0.1)}
