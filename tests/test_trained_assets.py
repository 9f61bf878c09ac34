"""The trained checkpoints and what was measured with them: small enough to keep, long enough to matter, all there."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch

from specattn_bench import acceptance
from specattn_bench.acceptance import BUDGETS, CONTEXTS, DRAFT_LENS
from specattn_bench.acceptance_study import EVERYTHING, FORCED, GENERATED, MODES, SERIES
from specattn_bench.acceptance_texts import SETS
from specattn_bench.corpus import library, names_in
from specattn_runtime.model.checkpoint import load_llama

ASSETS = Path(__file__).parent / "assets"
RESULTS = Path(__file__).parent.parent / "benchmarks" / "results" / "acceptance"
TRAINED = {"tiny-bytes-8k": 2, "tiny-bytes-8k-mha": 8}


@pytest.mark.parametrize(("name", "kv_heads"), TRAINED.items())
def test_a_checkpoint_is_small_and_has_long_contexts(name: str, kv_heads: int) -> None:
    folder = ASSETS / name
    assert (folder / "model.safetensors").stat().st_size < 10e6
    config = load_llama(folder, dtype=torch.float32).config
    assert (config.heads.num_q_heads, config.heads.num_kv_heads) == (8, kv_heads)
    assert config.max_positions >= 8192 + 512


@pytest.mark.parametrize("name", TRAINED)
def test_its_log_says_that_it_learnt(name: str) -> None:
    log = [json.loads(line) for line in (ASSETS / name / "training.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == sorted({line["step"] for line in log})
    assert log[-1]["length"] == 8192
    assert log[-1]["answer_bits"] < log[0]["answer_bits"]


@pytest.mark.parametrize("name", TRAINED)
def test_its_held_out_files_are_the_librarys(name: str) -> None:
    listed = set((ASSETS / name / "heldout.txt").read_text().split())
    assert len(listed & set(names_in(library()))) > 5  # some come and go with Python's versions
    corpus = acceptance.corpus_of(ASSETS / name, ())
    assert set(corpus.names) <= listed
    assert len(corpus.joined) > 50_000


@pytest.mark.parametrize("name", TRAINED)
def test_what_was_measured_is_all_there(name: str) -> None:
    answer = json.loads((RESULTS / f"{name}.json").read_text())
    assert answer["model"] == name
    measured = {
        (one["mode"], one["text"], one["context"], one["series"], one["budget"], one["draft_len"])
        for one in answer["results"]
    }
    for series in SERIES:
        budgets = (0.07,) if series == EVERYTHING else BUDGETS
        assert set(itertools.product((FORCED,), SETS, CONTEXTS, (series,), budgets, DRAFT_LENS)) <= measured
        assert set(itertools.product(GENERATED, SETS, CONTEXTS, (series,), (0.07,), (6,))) <= measured
    assert (RESULTS / f"{name}.png").is_file()
    assert (RESULTS / f"{name}.md").read_text().count("| `streaming` |") == len(MODES) * len(SETS) * len(CONTEXTS)
