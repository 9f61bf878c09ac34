"""Memory that is kept: the same from one use to the next, with room to grow, and laid out as kernels like it."""

from __future__ import annotations

import torch

from specattn_runtime.scratch import KeptScores, Scratch

CPU = torch.device("cpu")


def test_scores_take_the_place_of_those_before_while_texts_grow() -> None:
    memory = KeptScores()
    first = memory.lend((2, 3, 4, 1000), CPU)
    longer, fewer = memory.lend((2, 3, 4, 1200), CPU), memory.lend((1, 2, 1, 77), CPU)
    assert first.data_ptr() == longer.data_ptr() == fewer.data_ptr()
    assert memory.lend((2, 3, 4, 5000), CPU).shape == (2, 3, 4, 5000)


def test_rows_of_scores_begin_at_cache_lines_and_layers_fold_into_requests() -> None:
    scores = KeptScores().lend((2, 3, 4, 1001), CPU)
    assert scores.data_ptr() % 64 == 0
    assert [stride * scores.element_size() % 64 for stride in scores.stride()] == [0, 0, 0, 4]
    assert scores.flatten(0, 1).data_ptr() == scores.data_ptr()


def test_scores_lent_in_inference_mode_may_be_written_outside_of_it() -> None:
    with torch.inference_mode():
        scores = KeptScores().lend((1, 1, 1, 5), CPU)
    scores[...] = 1.0
    assert scores.sum() == 5.0


def test_a_kept_workspace_is_lent_again_until_more_is_needed_than_it_has_room_for() -> None:
    kept, fresh = Scratch(CPU, keep=True), Scratch(CPU, keep=False)
    first = kept.lend(1000, None)
    assert kept.lend(1200, None).data_ptr() == first.data_ptr()
    assert kept.lend(5000, None).numel() >= 5000
    one, other = fresh.lend(1000, None), fresh.lend(1000, None)
    assert one.data_ptr() != other.data_ptr()
