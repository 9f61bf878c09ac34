"""Which reference each verified row gets: its own draft step's, the highest of its request's steps, or the fallback."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from specattn_codegen.policy import TopK
from specattn_codegen.results import Selection, SparseOutput, VerifyOutput
from specattn_codegen.spec import ScoreSpec
from specattn_runtime.cache.paged_cache import PagedCache
from specattn_runtime.decoding.decode_spec import DecodeSpec
from specattn_runtime.decoding.engine import generate
from specattn_runtime.decoding.presets import PRESETS
from specattn_runtime.decoding.reference_kernels import ReferenceKernels
from specattn_runtime.decoding.references import row_references
from specattn_runtime.decoding.round import Decoder
from specattn_runtime.decoding.stopwatch import Stopwatch
from specattn_runtime.decoding.turn import Turn
from specattn_runtime.model.llama import Llama
from tiny_models import one_thread, wavy_llama  # noqa: F401 - a fixture that applies by being here

NAN = math.nan
SCORE = ScoreSpec(rows="all", heads="kv_head", normaliser="reference")


def test_rows_take_their_own_step_then_the_highest_and_none_is_below_the_floor() -> None:
    # One layer and head; requests of three steps, of one, and of none.
    steps = [torch.tensor(step).view(1, 3, 1) for step in ([5.0, 2.0, NAN], [7.0, NAN, NAN], [6.0, NAN, NAN])]
    found = row_references(steps, torch.tensor([5.5, 1.0, 3.0]).view(1, 3, 1))
    assert found[0, :, :, 0].tolist() == [[5.5, 7.0, 6.0, 7.0], [2.0, 2.0, 2.0, 2.0], [3.0, 3.0, 3.0, 3.0]]


def test_the_highest_is_of_each_layer_and_head() -> None:
    steps = torch.randn(3, 2, 1, 4, generator=torch.Generator().manual_seed(0))  # steps, layers, B, Hq
    found = row_references(list(steps), torch.full((2, 1, 4), -math.inf))
    assert torch.equal(found[:, 0, :3], steps[:, :, 0].transpose(0, 1))
    assert torch.equal(found[:, 0, 3], steps[:, :, 0].amax(dim=0))


def test_without_a_step_all_rows_take_the_floor() -> None:
    assert row_references([], torch.tensor([4.0, -math.inf]).view(1, 2, 1))[0, :, :, 0].tolist() == [[4.0], [-math.inf]]


class RememberingKernels(ReferenceKernels):
    """Keeps each verification's score, references and lse, and each draft step's lse, call after call."""

    def __init__(self, model: Llama) -> None:
        super().__init__(model.config.heads)
        self.scores: list[ScoreSpec | None] = []
        self.references: list[torch.Tensor | None] = []
        self.verified: list[torch.Tensor] = []
        self.drafted: list[torch.Tensor] = []

    def verify_attention(
        self,
        *args: torch.Tensor,
        max_q: int,
        max_kv: int | None = None,
        score: ScoreSpec | None = None,
        lse_ref: torch.Tensor | None = None,
        **_: object,
    ) -> VerifyOutput:
        found = super().verify_attention(*args, max_q=max_q, max_kv=max_kv, score=score, lse_ref=lse_ref)
        self.scores.append(score)
        self.references.append(lse_ref)
        self.verified.append(found.lse)
        return found

    def sparse_attention(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        page_table: torch.Tensor,
        kv_lens: torch.Tensor,
        cu_q: torch.Tensor,
        selection: Selection,
        tail_start: torch.Tensor,
        *,
        max_q: int,
        max_kv: int | None = None,
        **_: object,
    ) -> SparseOutput:
        call = (q, k_cache, v_cache, page_table, kv_lens, cu_q, selection, tail_start)
        found = super().sparse_attention(*call, max_q=max_q, max_kv=max_kv)
        self.drafted.append(found.lse)
        return found


@pytest.fixture(scope="module")
def wavy() -> Llama:
    return wavy_llama()


def prompt_of(length: int) -> list[int]:
    return torch.randint(256, (length,), generator=torch.Generator().manual_seed(length)).tolist()


@torch.inference_mode()
def test_verification_gets_what_the_draft_steps_of_a_ragged_batch_computed(wavy: Llama) -> None:
    kernels = RememberingKernels(wavy)
    decoder = Decoder(
        model=wavy,
        kernels=(kernels,) * 2,
        cache=PagedCache(wavy.config.heads, layers=2, num_pages=40, page_size=7, batch=3, dtype=torch.float64),
        preset=PRESETS["reference"],
        stopwatch=Stopwatch(),
    )
    for request, length in enumerate((40, 12, 30)):
        decoder.prefill(request, prompt_of(length)[:-4])
    ends = [tuple(prompt_of(length)[-4:]) for length in (40, 12, 30)]
    _, view = decoder.round([Turn(tokens=end, joins=True, policy=TopK(k=5)) for end in ends], None)
    assert kernels.scores == [dataclasses.replace(SCORE, normaliser="exact")] * 2
    assert kernels.references == [None, None]
    floors = [lse.view(3, 4, -1).amin(dim=1) for lse in kernels.verified]

    drafts = zip((7, 8, 9), (3, 1, 0), strict=True)  # the third makes none
    decoder.round([Turn(tokens=(token,), draft_len=length, policy=TopK(k=5)) for token, length in drafts], view)
    steps = [kernels.drafted[layer::2] for layer in range(2)]
    assert [len(lse) for lse in steps[0]] == [2, 1, 1]
    for layer in range(2):
        first, second, third = steps[layer]
        references = kernels.references[2 + layer]
        assert kernels.scores[2 + layer] == SCORE
        assert references is not None
        assert references.is_contiguous()
        drafted = torch.stack([first[0], second[0], third[0]])
        expected = torch.cat([drafted, drafted.amax(dim=0, keepdim=True), first[[1, 1]], floors[layer][[2]]])
        floor = floors[layer][[0, 0, 0, 0, 1, 1, 2]]
        assert bool((expected < floor).any())
        assert torch.equal(references, expected.maximum(floor))


def test_every_round_is_normalised_by_references_and_no_other_preset_is(wavy: Llama) -> None:
    for name, preset in PRESETS.items():
        kernels = RememberingKernels(wavy)
        spec = DecodeSpec(preset=dataclasses.replace(preset, min_budget=4), draft_len=3, max_new_tokens=9)
        generate(wavy, kernels, [prompt_of(40)], spec)
        given = [lse is not None for lse in kernels.references]
        assert given[:2] == [False, False]
        assert set(given[2:]) == {name == "reference"}
