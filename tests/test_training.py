"""Training: it learns, a run that was cut goes on to the very same weights, and others can load what it writes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from transformers import LlamaForCausalLM

from benchmarks.training import __main__ as main
from benchmarks.training import batches, evaluation, model, run, schedule
from benchmarks.training.run import Asked
from benchmarks.training.schedule import Stage
from specattn_bench.corpus import Corpus
from specattn_codegen.errors import SpecError
from specattn_runtime.model.checkpoint import load_llama
from specattn_runtime.model.llama_config import parse_config
from tiny_models import one_thread  # noqa: F401 - a fixture that applies by being here

STAGES = (Stage(start=0.0, length=48, sequences=4), Stage(start=0.7, length=96, sequences=2))
FIELDS = model.config_fields(2, hidden_size=32, layers=2, max_positions=200)


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    source = "".join(f"def added_{i % 7}(left, right):\n    return left + right * {i % 5}\n\n" for i in range(200))
    return Corpus(names=("a.py",), texts=(source.encode(),))


@dataclass
class Ticks:
    """A clock that a step moves by a second; `cut` is the step that is killed."""

    now: float = 100.0
    cut: int | None = None

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        real = run.step

        def ticking(going: run.Run, *arguments: object) -> float:
            if going.step == self.cut:
                raise KeyboardInterrupt
            self.now += 1.0
            return real(going, *arguments)  # pyright: ignore[reportArgumentType]

        monkeypatch.setattr(run, "step", ticking)

    def asked(self, folder: Path) -> Asked:
        return Asked(
            folder=folder,
            fields=FIELDS,
            weights=model.first_weights(parse_config(FIELDS), 3),
            rate=4e-3,
            seconds=24.0,
            keep_seconds=5.0,
            seed=3,
            clock=lambda: self.now,
            stages=STAGES,
            evaluated=12,
        )


def trained(corpus: Corpus, folder: Path, cut: int | None = None) -> run.Run:
    with pytest.MonkeyPatch.context() as patch:
        ticks = Ticks(cut=cut)
        ticks.install(patch)
        return run.train(ticks.asked(folder), corpus, corpus)


@pytest.fixture(scope="module")
def whole(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> tuple[run.Run, Path]:
    folder = tmp_path_factory.mktemp("whole")
    return trained(corpus, folder), folder


def test_it_learns_and_says_so(whole: tuple[run.Run, Path]) -> None:
    found, folder = whole
    log = [json.loads(line) for line in (folder / run.LOG).read_text().splitlines()]
    assert log == found.log
    assert [line["step"] for line in log] == [5, 10, 15, 20, 24]
    assert [line["length"] for line in log] == [48, 48, 48, 96, 96]
    assert log[-1]["bytes"] == 24 * 192
    assert log[-1]["plain_bits"] < log[0]["plain_bits"] - 0.5
    assert log[-1]["train_bits"] < 8.0


def test_a_cut_run_goes_on_to_the_same_weights(whole: tuple[run.Run, Path], corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        trained(corpus, tmp_path, cut=13)
    again = trained(corpus, tmp_path)
    assert again.log == whole[0].log
    for name, weight in whole[0].weights.items():
        assert torch.equal(again.weights[name], weight), name


def test_transformers_and_the_runtime_read_the_checkpoint_alike(whole: tuple[run.Run, Path]) -> None:
    found, folder = whole
    assert parse_config(json.loads((folder / "config.json").read_text())) == parse_config(FIELDS)
    theirs = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    text = torch.arange(60)[None] % 7 + 97
    positions = torch.arange(60)[None]
    halves = {name: weight.detach().half().float() for name, weight in found.weights.items()}
    ours = model.logits(parse_config(FIELDS), halves, text, positions)
    expected = theirs(text).logits
    # Products in bfloat16 against float32: 8 bits of 2 layers' sums.
    assert torch.allclose(ours, expected, atol=0.03 * expected.abs().max().item())
    assert load_llama(folder, dtype=torch.float32).num_layers == 2


def test_a_twin_with_more_kv_heads_starts_as_the_same_function(whole: tuple[run.Run, Path]) -> None:
    text, positions = torch.arange(50)[None] * 5 % 256, torch.arange(50)[None]
    found = {}
    for kv_heads in (2, 8):
        fields, weights = model.started(whole[1], kv_heads, 300)
        assert fields["max_position_embeddings"] == 300
        found[kv_heads] = model.logits(parse_config(fields), weights, text, positions)
    assert weights["model.layers.0.self_attn.k_proj.weight"].shape == (8 * 32, 32)
    assert torch.allclose(found[2], found[8], atol=0.02 * found[2].abs().max().item())  # products in bfloat16
    with pytest.raises(SpecError, match="has 2 KV heads, of which 3 is no multiple"):
        model.started(whole[1], 3, 300)


def test_a_step_reads_what_its_number_says(corpus: Corpus) -> None:
    def read(step: int) -> batches.Batch:
        return batches.batch(corpus, seed=1, step=step, sequences=6, length=80, max_positions=300)

    first, again, other = read(4), read(4), read(5)
    assert torch.equal(first.inputs, again.inputs)
    assert torch.equal(first.positions, again.positions)
    assert not torch.equal(first.inputs, other.inputs)
    assert torch.equal(first.inputs[:, 1:], first.targets[:, :-1])
    steps = torch.cat([read(step).positions.diff(dim=1) for step in range(8)])
    assert bool((steps >= 1).all())
    skipping = (steps > 1).any(dim=1).double().mean().item()
    assert 0.2 < skipping < 0.8
    assert max(int(read(step).positions.max()) for step in range(8)) < 300


def test_only_answers_count_in_the_answers_bits(corpus: Corpus) -> None:
    found = evaluation.answers(corpus, seed=0, passages=3, length=200)
    assert found.texts.shape == (3, 201)
    assert 0.02 < found.counted.double().mean().item() < 0.5
    assert not found.counted[:, :132].any()
    config = parse_config(FIELDS)
    weights = model.first_weights(config, 0)
    nothing = {name: weight.detach() * (weight.ndim == 1) for name, weight in weights.items()}
    assert evaluation.bits(config, nothing, found) == pytest.approx(8.0)  # bytes are equally likely


def test_the_rate_rises_and_falls() -> None:
    rates = [schedule.learning_rate(progress / 100, 0.5) for progress in range(101)]
    assert max(rates) == pytest.approx(0.5, rel=1e-3)
    top = rates.index(max(rates))
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert rates[-1] == pytest.approx(0.5 * schedule.LAST_RATE)


def test_it_never_reads_what_the_checkpoint_it_starts_from_never_saw(
    whole: tuple[run.Run, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library, asked = tmp_path / "library", []
    library.mkdir()
    for name in ("learnt.py", "kept_apart.py", "new.py"):
        (library / name).write_text(f"'{name}'\n" * 2000)
    (whole[1] / "heldout.txt").write_text("kept_apart.py\nabsent.py\n")
    monkeypatch.setattr(main.corpus, "library", lambda: library)
    monkeypatch.setattr(main, "train", lambda *given: asked.extend(given) or whole[0])
    out = tmp_path / "out"
    result = CliRunner().invoke(main.command, ["--heads", "mha", "--start", str(whole[1]), "--out", str(out)])
    assert result.exit_code == 0, result.output
    settings, learnt, held_out = asked
    assert (learnt.names, held_out.names) == (("learnt.py", "new.py"), ("kept_apart.py",))
    assert (out / "heldout.txt").read_text() == "kept_apart.py\n"
    assert (settings.seconds, settings.fields["num_key_value_heads"]) == (90 * 60, 8)
    assert settings.fields["max_position_embeddings"] == 9216
    assert result.output.count("answer_bits") == len(whole[0].log)
