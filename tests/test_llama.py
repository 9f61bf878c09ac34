"""The Llama against transformers: live where that package is installed, and always against numbers it once gave."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from specattn_codegen import ScoreSpec
from specattn_runtime.cache.paged_cache import PagedCache, Rows
from specattn_runtime.decoding.phases import Prefill, Verify
from specattn_runtime.decoding.reference_kernels import ReferenceKernels
from specattn_runtime.model.checkpoint import load_llama
from specattn_runtime.model.llama import Attention, Llama
from tiny_models import CONFIG, STRETCHED, TRAINED, one_thread, save_checkpoint  # noqa: F401 - a fixture that applies by being here

PROMPT = (
    b"def read_lines(path):\n    with open(path) as stream:\n        return [line.rstrip() for line in stream]\n\n\ncla"
)
GOLDEN = Path(__file__).parent / "assets" / "llama_logits.json"
LINEAR: dict[str, object] = {**CONFIG, "rope_scaling": {"type": "linear", "factor": 3.0}}
CASES = {"trained": None, "plain": CONFIG, "linear": LINEAR, "stretched": STRETCHED}
POSITIONS = [0, 1, 17, 63, len(PROMPT) - 1]
TOKENS = [0, 10, 32, 101, 255]


def checkpoint_folder(case: str, scratch: Path) -> Path:
    fields = CASES[case]
    if fields is None:
        return TRAINED
    save_checkpoint(scratch, fields)
    return scratch


def dense_logits(model: Llama, prompt: bytes) -> torch.Tensor:
    """Logits of every position [N, vocab], by SDPA alone."""
    cache, rows = one_request(model, len(prompt))
    return all_logits(
        model, prompt, rows, Prefill(kernels=[ReferenceKernels(model.heads)] * model.num_layers, cache=cache, rows=rows)
    )


def one_request(model: Llama, length: int) -> tuple[PagedCache, Rows]:
    cache = PagedCache(
        model.config.heads,
        layers=model.config.num_layers,
        num_pages=length,
        page_size=7,
        batch=1,
        dtype=model.dtype,
    )
    return cache, cache.extend([length])


@torch.inference_mode()
def all_logits(model: Llama, prompt: bytes, rows: Rows, attention: Attention) -> torch.Tensor:
    return model.logits(model.forward(torch.tensor(list(prompt)), rows.positions, attention))


@torch.inference_mode()
def transformers_logits(folder: Path, prompt: bytes) -> torch.Tensor:
    """The same from transformers in float64, with the one step it insists on doing in float32 (the norm) in float64."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float64)
    for module in theirs.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            norm = torch.nn.RMSNorm(module.weight.shape, eps=module.variance_epsilon, dtype=torch.float64)
            norm.weight = module.weight
            module.forward = norm.forward
    return theirs(torch.tensor([list(prompt)])).logits[0]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(case: str, tmp_path: Path) -> None:
    folder = checkpoint_folder(case, tmp_path)
    theirs = transformers_logits(folder, PROMPT)
    ours = dense_logits(load_llama(folder, dtype=torch.float64), PROMPT)
    assert (ours - theirs).abs().max().item() < 1e-9 * theirs.abs().max().item()


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_transformers_5_23_gave(case: str, tmp_path: Path) -> None:
    ours = dense_logits(load_llama(checkpoint_folder(case, tmp_path), dtype=torch.float64), PROMPT)
    golden = torch.tensor(json.loads(GOLDEN.read_text())[case], dtype=torch.float64)
    # Angles are float32, and another processor's cosine may differ in its last place.
    assert (ours[POSITIONS][:, TOKENS] - golden).abs().max().item() < 1e-5


def test_verification_of_every_row_computes_what_prefill_does() -> None:
    model = load_llama(TRAINED, dtype=torch.float64)
    expected = dense_logits(model, PROMPT[:40])
    cache, rows = one_request(model, 40)
    attention = Verify(
        kernels=[ReferenceKernels(model.heads)] * model.num_layers,
        cache=cache,
        rows=rows,
        score=ScoreSpec(rows="ends", heads="layer"),
    )
    assert torch.allclose(all_logits(model, PROMPT[:40], rows, attention), expected, atol=1e-10, rtol=0)
    assert len(attention.scores) == model.config.num_layers


def test_half_precision_stays_near_the_float64_logits() -> None:
    expected = dense_logits(load_llama(TRAINED, dtype=torch.float64), PROMPT)
    for dtype, bound in ((torch.float32, 1e-3), (torch.bfloat16, 0.6)):
        logits = dense_logits(load_llama(TRAINED, dtype=dtype), PROMPT)
        assert logits.dtype == dtype
        assert (logits.double() - expected).abs().max().item() < bound
