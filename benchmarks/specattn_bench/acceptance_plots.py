"""Tokens a round as a picture: who drafts best, and how far that goes with context, budget and draft length."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
COLUMNS, PANEL = 3, (4.6, 3.0)  # inches


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """Cells against where `place` puts them; cells at one place are averaged."""

    title: str
    x_label: str
    cells: Sequence[Summary]
    place: Callable[[Summary], float]
    tick: Callable[[float], str]

    @property
    def places(self) -> list[float]:
        return sorted({self.place(one) for one in self.cells})


def draw(path: Path, title: str, summaries: Sequence[Summary], *, budget: float, draft_len: int) -> None:
    """Every mode and set against context at one budget and draft length, and against these, a mean over the far
    contexts. Every key selected, which loses nothing, is left out. The suffix decides the format."""
    found = [
        panel
        for mode in MODES
        for text_set in SETS
        for panel in _panels(f"{text_set}, {MEANING[mode]}", _of(summaries, mode, text_set), budget, draft_len)
    ]
    shown = [panel for panel in found if len(panel.places) > 1] or found[:1]
    rows = -(-len(shown) // COLUMNS)
    figure = Figure(figsize=(COLUMNS * PANEL[0], rows * PANEL[1] + 0.8), layout="constrained", facecolor="white")
    told = f"{title}; solid: keys chosen by what verification scored"
    figure.suptitle(told, fontsize=FONT_SIZE + 3, color=INK, x=0.01, ha="left")
    colour = colours([name for name in NAMES if name in GUIDED], [name for name in NAMES if name not in GUIDED])
    all_axes = list(figure.subplots(rows, COLUMNS, squeeze=False).flat)
    for axes, panel in zip(all_axes, shown, strict=False):
        _lines(axes, panel, colour)
    for axes in all_axes[len(shown) :]:
        axes.set_axis_off()
    handles, labels = all_axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=len(NAMES), frameon=False, fontsize=FONT_SIZE)
    figure.savefig(path, dpi=110)


def _panels(title: str, cells: Sequence[Summary], budget: float, draft_len: int) -> list[Panel]:
    if not cells:
        return []
    far = _far([one.context for one in cells])
    where = "-".join(_thousands(context) for context in sorted({min(far), max(far)}))
    away = [one for one in cells if one.context in far]
    return [
        Panel(
            title=title,
            x_label=f"context, at {budget:.0%} and {draft_len} drafts",
            cells=[one for one in cells if one.case.budget == budget and one.case.draft_len == draft_len],
            place=lambda one: one.context,
            tick=_thousands,
        ),
        Panel(
            title=title,
            x_label=f"share of the prefix selected, at {where} and {draft_len} drafts",
            cells=[one for one in away if one.case.draft_len == draft_len],
            place=lambda one: one.case.budget,
            tick="{:.0%}".format,
        ),
        Panel(
            title=title,
            x_label=f"drafts a round, at {where} and {budget:.0%}",
            cells=[one for one in away if one.case.budget == budget],
            place=lambda one: one.case.draft_len,
            tick="{:.0f}".format,
        ),
    ]


def _of(summaries: Sequence[Summary], mode: str, text_set: str) -> list[Summary]:
    return [one for one in summaries if (one.mode, one.text_set) == (mode, text_set) and one.case.series != EVERYTHING]


def _far(contexts: Sequence[int]) -> set[int]:
    """The contexts that count as long, or else the longest."""
    return {context for context in contexts if context >= FAR} or {max(contexts)}


def _thousands(context: float) -> str:
    return f"{context // 1024:.0f}K" if context % 1024 == 0 else f"{context:.0f}"


def _lines(axes: Axes, panel: Panel, colour: Mapping[str, str]) -> None:
    """A line a series; the one that the others are compared with is black."""
    plain(axes)
    for series in NAMES:
        mine = [one for one in panel.cells if one.case.series == series]
        places = sorted({panel.place(one) for one in mine})
        axes.plot(
            places,
            [statistics.fmean(one.tokens for one in mine if panel.place(one) == where) for where in places],
            color=INK if series == BASELINE else colour[series],
            marker="o",
            ms=4,
            lw=2.2 if series == BASELINE else 1.6,
            ls="-" if series in GUIDED else "--",
            label=series,
        )
    axes.set_title(panel.title, fontsize=FONT_SIZE + 1.5, color=INK, loc="left")
    axes.set_xlabel(panel.x_label, fontsize=FONT_SIZE, color=INK)
    axes.set_ylabel("tokens a round", fontsize=FONT_SIZE, color=INK)
    if max(panel.places) > 1000:
        axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(panel.places))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([panel.tick(place) for place in panel.places])
