"""A picture of many cases, one a line: the times of all series on the left, ratios of ours on the right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from specattn_bench.plots import FAINT, FONT_SIZE, INK, Bars, plain
from specattn_bench.standing import Standing

INCHES_A_CASE = 0.55


def draw(path: Path, title: str, found: Sequence[Standing], bars: Bars, colour: Mapping[str, str]) -> None:
    """Writes the picture; its suffix decides the format."""
    cases = list(dict.fromkeys(one.series.case.name for one in found))
    figure = Figure(figsize=(14, 2.6 + INCHES_A_CASE * len(cases)), layout="constrained", facecolor="white")
    left, right = figure.subplots(1, 2, sharey=True)
    figure.suptitle(title, fontsize=FONT_SIZE + 3, color=INK, x=0.01, ha="left")
    times(left, cases, found, colour)
    ratios(right, cases, bars, colour)
    left.set_ylim(len(cases) - 0.45, -0.55)
    left.set_yticks(range(len(cases)), cases)
    handles = [Line2D([], [], marker="s", ls="", ms=8, color=colour[name], label=name) for name in colour]
    handles.append(Line2D([], [], marker="|", ls="", ms=11, mew=1.6, color=INK, label="floor of this run"))
    figure.legend(handles=handles, loc="outside lower left", ncols=4, frameon=False, fontsize=FONT_SIZE)
    figure.savefig(path, dpi=160)


def _lines(axes: Axes, base: int) -> None:
    plain(axes)
    axes.tick_params(axis="y", length=0)
    axes.set_xscale("log", base=base)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def times(axes: Axes, cases: Sequence[str], found: Sequence[Standing], colour: Mapping[str, str]) -> None:
    """A dot for every series, and the floor of ours."""
    _lines(axes, base=10)
    for one in found:
        y = cases.index(one.series.case.name)
        axes.plot(one.timing.median_us / 1e3, y, "o", color=colour[one.series.label], ms=7, mec="white", mew=0.7)
        if one.series.kind == "ours":
            axes.plot(one.floor.microseconds / 1e3, y, "|", color=INK, ms=13, mew=1.6)
    axes.set_xlabel("milliseconds, median", fontsize=FONT_SIZE, color=INK)
    axes.set_title("Times of this run", fontsize=FONT_SIZE + 1, color=INK, loc="left")


def ratios(axes: Axes, cases: Sequence[str], bars: Bars, colour: Mapping[str, str]) -> None:
    """Bars from 1 for every series of ours, and diamonds for the second ratio."""
    _lines(axes, base=2)
    for place, case in enumerate(cases):
        named = [name for name in colour if case in bars.values.get(name, {}) or case in bars.marks.get(name, {})]
        height = 0.8 / max(1, len(named))
        for order, name in enumerate(named):
            y = place + (order - (len(named) - 1) / 2) * height
            _ratio(
                axes, y, height, bars.values.get(name, {}).get(case), bars.marks.get(name, {}).get(case), colour[name]
            )
    axes.axvline(1, color=FAINT, lw=1)
    axes.set_xlabel("times as fast", fontsize=FONT_SIZE, color=INK)
    said = f"Bars: beside {bars.label}\nDiamonds: beside {bars.marks_label}"
    axes.set_title(said, fontsize=FONT_SIZE + 1, color=INK, loc="left")


def _ratio(axes: Axes, y: float, height: float, bar: float | None, mark: float | None, colour: str) -> None:
    if bar is not None:
        axes.barh(y, bar - 1, 0.9 * height, left=1, color=colour)
        inside = bar > 1.6
        axes.annotate(
            f"{bar:.3g}",
            (1 if inside else max(1.0, bar), y),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=FONT_SIZE - 2,
            color="white" if inside else INK,
        )
    if mark is not None:
        axes.plot(mark, y, "D", color=colour, ms=5, mec=INK, mew=0.6)
