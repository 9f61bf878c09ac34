"""Tokens a round as a picture: who drafts best, and how far that goes with context, budget and draft length."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from specattn_bench.acceptance_report import BASELINE, FAR, GUIDED, Summary
from specattn_bench.acceptance_study import EVERYTHING, MODES, SERIES
from specattn_bench.acceptance_texts import SETS
from specattn_bench.plots import FONT_SIZE, INK, colours, plain

MEANING = {
    "forced": "expected along the text",
    "greedy": "generated, greedy",
    "sampled": "generated, temperature 0.6",
}
NAMES = tuple(name for name in SERIES if name != EVERYTHING)
PANEL = (4.6, 3.0)  # inches


def draw(path: Path, title: str, summaries: Sequence[Summary], *, budget: float, draft_len: int) -> None:
    """A row a mode and set: against context at one budget and draft length, then against these, a mean over the far
    contexts. Every key selected, which loses nothing, is left out. The suffix decides the format."""
    rows = [(mode, text_set) for mode in MODES for text_set in SETS if any(_of(summaries, mode, text_set))]
    figure = Figure(figsize=(3 * PANEL[0], len(rows) * PANEL[1] + 0.8), layout="constrained", facecolor="white")
    told = f"{title}; solid: keys chosen by what verification scored"
    figure.suptitle(told, fontsize=FONT_SIZE + 3, color=INK, x=0.01, ha="left")
    colour = colours([name for name in NAMES if name in GUIDED], [name for name in NAMES if name not in GUIDED])
    all_axes = figure.subplots(len(rows), 3, sharey="row", squeeze=False)
    for axes, (mode, text_set) in zip(all_axes, rows, strict=True):
        mine = _of(summaries, mode, text_set)
        usual = [one for one in mine if one.case.budget == budget and one.case.draft_len == draft_len]
        far = _far([one.context for one in mine])
        away = [one for one in mine if one.context in far]
        where = "-".join(_thousands(context) for context in sorted({min(far), max(far)}))
        _lines(axes[0], usual, lambda one: one.context, colour)
        _name(axes[0], f"{text_set}, {MEANING[mode]}", f"context, at {budget:.0%} and {draft_len} drafts")
        axes[0].set_xscale("log")
        _ticks(axes[0], {one.context: _thousands(one.context) for one in usual})
        by_budget = [one for one in away if one.case.draft_len == draft_len]
        _lines(axes[1], by_budget, lambda one: one.case.budget, colour)
        _name(axes[1], "", f"share of the prefix selected, at {where} and {draft_len} drafts")
        _ticks(axes[1], {one.case.budget: f"{one.case.budget:.0%}" for one in by_budget})
        by_length = [one for one in away if one.case.budget == budget]
        _lines(axes[2], by_length, lambda one: one.case.draft_len, colour)
        _name(axes[2], "", f"drafts a round, at {where} and {budget:.0%}")
        _ticks(axes[2], {one.case.draft_len: str(one.case.draft_len) for one in by_length})
        axes[0].set_ylabel("tokens a round", fontsize=FONT_SIZE, color=INK)
    handles, labels = all_axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=len(NAMES), frameon=False, fontsize=FONT_SIZE)
    figure.savefig(path, dpi=110)


def _of(summaries: Sequence[Summary], mode: str, text_set: str) -> list[Summary]:
    return [one for one in summaries if (one.mode, one.text_set) == (mode, text_set) and one.case.series != EVERYTHING]


def _far(contexts: Sequence[int]) -> set[int]:
    """The contexts that count as long, or else the longest."""
    return {context for context in contexts if context >= FAR} or {max(contexts)}


def _thousands(context: int) -> str:
    return f"{context // 1024}K" if context % 1024 == 0 else str(context)


def _name(axes: Axes, title: str, x_label: str) -> None:
    axes.set_title(title, fontsize=FONT_SIZE + 1.5, color=INK, loc="left")
    axes.set_xlabel(x_label, fontsize=FONT_SIZE, color=INK)


def _ticks(axes: Axes, labels: Mapping[float, str]) -> None:
    axes.xaxis.set_major_locator(FixedLocator(sorted(labels)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([labels[place] for place in sorted(labels)])


def _lines(axes: Axes, cells: Sequence[Summary], place: Callable[[Summary], float], colour: Mapping[str, str]) -> None:
    """A line a series, the one that the others are compared with in black; cells at one place are averaged."""
    plain(axes)
    for series in NAMES:
        mine = [one for one in cells if one.case.series == series]
        places = sorted({place(one) for one in mine})
        axes.plot(
            places,
            [statistics.fmean(one.tokens for one in mine if place(one) == where) for where in places],
            color=INK if series == BASELINE else colour[series],
            marker="o",
            ms=4,
            lw=2.2 if series == BASELINE else 1.6,
            ls="-" if series in GUIDED else "--",
            label=series,
        )
