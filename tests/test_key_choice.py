"""Rankings, shares and budgets of drafts' keys against the definition, and every preset's total of keys."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from specattn_codegen import HeadConfig, TopK
from specattn_codegen.proof.reference import select_kv
from specattn_codegen.results import Selection, SparseOutput
from specattn_runtime.decoding.decode_spec import DecodeSpec
from specattn_runtime.decoding.key_choice import at_random, force_recents, look_ahead, newest_first, select_by_policy
from specattn_runtime.decoding.presets import PRESETS
from specattn_runtime.decoding.reference_kernels import ReferenceKernels
from specattn_runtime.decoding.session import open_session
from specattn_runtime.model.llama import Llama
from tiny_models import one_thread, wavy_llama  # noqa: F401 - a fixture that applies by being here

KERNELS = ReferenceKernels(HeadConfig(num_q_heads=4, num_kv_heads=2, head_dim=4))
PREFIXES = (30, 0, 17, 21)
LENGTHS = torch.tensor(PREFIXES, dtype=torch.int32)


def random_scores(rows: int) -> torch.Tensor:
    return torch.rand(rows, 2, 32, generator=torch.Generator().manual_seed(rows))


def test_every_request_selects_by_its_own_policy() -> None:
    policies = [TopK(k=5), TopK(k=5), None, TopK(ratio=0.5)]
    scores = random_scores(8)  # two layers of four requests
    found = select_by_policy(KERNELS, scores, LENGTHS, policies, sink=1, recent=2)
    for row in range(8):
        policy, length = policies[row % 4], PREFIXES[row % 4]
        count = 0 if policy is None else policy.budget(length)
        assert found.counts[row].tolist() == [count, count]
        if policy is not None:
            alone = select_kv(scores[row : row + 1], LENGTHS[[row % 4]], policy, sink=1, recent=2)
            assert torch.equal(found.indices[row, :, :count], alone.indices[0])
        assert (found.indices[row, :, count:] == -1).all()
    assert found.counts.dtype == torch.int32


def test_nobody_who_selects_is_nothing_selected() -> None:
    found = select_by_policy(KERNELS, random_scores(8), LENGTHS, [None] * 4, sink=1, recent=2)
    assert (found.indices == -1).all()
    assert not found.counts.any()


def test_one_policy_is_one_launch_and_pages_are_blocks() -> None:
    found = select_by_policy(KERNELS, random_scores(4), LENGTHS, [TopK(k=9)] * 4, sink=0, recent=0, block=4)
    assert found.block == 4
    assert found.counts[:, 0].tolist() == [3, 0, 3, 3]


@pytest.mark.parametrize(("share", "recents"), [(0.0, 0), (0.25, 3), (0.5, 5), (1.0, 10)])
def test_a_share_of_each_budget_is_the_newest_keys_and_the_rest_the_best_of_the_others(
    share: float, recents: int
) -> None:
    scores = random_scores(2)
    policies = [TopK(k=10), TopK(k=4)]
    prefixes = torch.tensor([30, 17], dtype=torch.int32)
    forced = force_recents(scores.clone(), (30, 17), policies, share)
    found = select_by_policy(KERNELS, forced, prefixes, policies, sink=0, recent=0)
    chosen = found.indices[0, 0, :10].tolist()
    newest = list(range(30 - recents, 30))
    others = scores[0, 0, : 30 - recents].sort(descending=True).indices[: 10 - recents].tolist()
    assert sorted(chosen) == sorted(others + newest)
    assert found.counts[1].tolist() == [4, 4]


@pytest.mark.parametrize("ahead", [1, 3, 5])
def test_keys_behind_a_good_one_count_as_much_and_what_is_past_a_prefix_does_not(ahead: int) -> None:
    scores = random_scores(4)
    for request, prefix in enumerate(PREFIXES):
        scores[request, :, prefix:] = float("nan")
    found = look_ahead(scores.clone(), len(LENGTHS), ahead)
    assert found.shape == scores.shape
    for request, prefix in enumerate(PREFIXES):
        for key in range(prefix):
            best = scores[request, :, max(0, key - ahead) : key + 1].amax(dim=1)
            assert torch.equal(found[request, :, key], best)


def test_newest_first_selects_the_end_of_the_prefix() -> None:
    found = select_by_policy(
        KERNELS, newest_first(4, 30, torch.device("cpu")), LENGTHS, [TopK(k=4)] * 4, sink=1, recent=0
    )
    assert found.indices[:, 0].tolist() == [[0, 27, 28, 29], [-1] * 4, [0, 14, 15, 16], [0, 18, 19, 20]]


def test_random_keys_are_spread_evenly_new_every_round_and_nobodys_neighbours() -> None:
    lengths = torch.arange(600, 1000, dtype=torch.int32)
    scores = at_random(3, lengths, 600)
    assert scores.shape == (1200, 1, 600)
    chosen = scores[:, 0].topk(60).indices
    # Each position is one of 60 of 600 in 1200 rows: 120 times, give or take six standard deviations of 10.4.
    counts = torch.bincount(chosen.flatten(), minlength=600)
    assert int(counts.min()) > 57
    assert int(counts.max()) < 183
    assert len({tuple(row) for row in chosen.tolist()}) == 1200  # no two layers, nor two prefixes, alike
    assert torch.equal(at_random(3, lengths[:1], 600)[:, 0], scores[::400, 0])


@pytest.fixture(scope="module")
def wavy() -> Llama:
    return wavy_llama()


def test_every_preset_reads_as_many_prefix_keys(wavy: Llama) -> None:
    """At a budget of 8 of 64 keys: two pages of four for who chooses pages."""
    counts = {}
    for name in (name for name, preset in PRESETS.items() if preset.drafts):
        counted = CountingKernels(wavy.heads)
        preset = dataclasses.replace(PRESETS[name], min_budget=0)
        spec = DecodeSpec(preset=preset, draft_len=2, budget=8 / 64, max_new_tokens=4, page_size=4)
        session = open_session(wavy, counted, spec, max_requests=1, num_pages=30)
        session.add_request([7 * i % 256 for i in range(67)])
        for _ in range(2):
            session.step()
        counts[name] = counted.keys
    assert set(counts) >= {"vegas", "pillar", "reference", "hybrid", "streaming", "quest", "random"}
    assert all(keys == {8} for keys in counts.values()), counts


class CountingKernels(ReferenceKernels):
    """Remembers how many selected keys before the tail each draft step may read, of any head."""

    def __init__(self, heads: HeadConfig) -> None:
        super().__init__(heads)
        self.keys: set[int] = set()

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
        assert ((selection.indices + 1) * selection.block <= tail_start[0]).all()
        self.keys.update((selection.counts * selection.block).flatten().tolist())
        call = (q, k_cache, v_cache, page_table, kv_lens, cu_q, selection, tail_start)
        return super().sparse_attention(*call, max_q=max_q, max_kv=max_kv)
