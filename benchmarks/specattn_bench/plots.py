"""Pictures of a run: a roofline with its points, and bars of ratios. Knows numbers and names, no question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from specattn_bench.ceilings import Ceilings

INK, FAINT, GRID = "#1f2933", "#7b8794", "#e4e7eb"
OURS = ("#0b4f8a", "#2f8fd8", "#3fb8a5", "#7a5cc2", "#c2528b", "#5b8c2a")
PEERS = ("#b8560f", "#e39a3b", "#9aa5b1", "#8c2f39", "#c9a227", "#616e7c", "#e07a7a", "#4a3728")
MARKERS = ("o", "s", "^", "D")
STYLES = ("-", "--", ":", "-.")
FONT_SIZE = 9.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """intensity: operations a byte; gflops: 10^9 operations a second; dtype chooses the marker."""

    series: str
    dtype: str
    case: str
    intensity: float
    gflops: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Bars:
    """Ratios by series, then by case. marks: a second ratio of the same, drawn as a small diamond."""

    label: str
    marks_label: str
    values: Mapping[str, Mapping[str, float]]
    marks: Mapping[str, Mapping[str, float]]


def colours(ours: Sequence[str], peers: Sequence[str]) -> dict[str, str]:
    """Cool colours for ours, warm ones for the rest."""
    chosen = {name: OURS[place % len(OURS)] for place, name in enumerate(ours)}
    return chosen | {name: PEERS[place % len(PEERS)] for place, name in enumerate(peers)}


def draw(
    path: Path, title: str, ceilings: Ceilings, points: Sequence[Point], bars: Bars, colour: Mapping[str, str]
) -> None:
    """Writes the picture; its suffix decides the format."""
    figure = Figure(figsize=(14, 7.2), layout="constrained", facecolor="white")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.15))
    figure.suptitle(title, fontsize=FONT_SIZE + 3, color=INK, x=0.01, ha="left")
    roofline(left, ceilings, points, colour)
    ratio_bars(right, bars, colour)
    handles = [Line2D([], [], marker="s", ls="", ms=8, color=colour[name], label=name) for name in colour]
    figure.legend(handles=handles, loc="outside lower left", ncols=5, frameon=False, fontsize=FONT_SIZE)
    figure.savefig(path, dpi=160)


def plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(colors=INK, labelsize=FONT_SIZE, length=3)
    axes.grid(visible=True, which="major", color=GRID, lw=0.8)
    axes.set_axisbelow(True)


def roofline(axes: Axes, ceilings: Ceilings, points: Sequence[Point], colour: Mapping[str, str]) -> None:
    """Measured ceilings as lines; every point under the roof of its dtype."""
    plain(axes)
    axes.set(xscale="log", yscale="log")
    dtypes = list(dict.fromkeys(point.dtype for point in points))
    low = min(point.intensity for point in points) / 1.8
    high = max(point.intensity for point in points) * 2.2
    for dtype, style in zip(dtypes, STYLES, strict=False):
        peak = ceilings.tflops[dtype] * 1e3
        ridge = peak / ceilings.bandwidth_gbs
        axes.plot(
            [min(low, ridge), ridge, max(high, 1.5 * ridge)],
            [ceilings.bandwidth_gbs * min(low, ridge), peak, peak],
            style,
            color=INK,
            lw=1.4,
        )
        axes.annotate(
            f"{dtype} {peak:.0f} GFLOP/s", (high, peak), ha="right", va="bottom", fontsize=FONT_SIZE, color=INK
        )
    _name_slope(axes, ceilings.bandwidth_gbs, low)
    for point in points:
        marker = MARKERS[dtypes.index(point.dtype) % len(MARKERS)]
        axes.plot(point.intensity, point.gflops, marker, color=colour[point.series], ms=7, mec="white", mew=0.7)
    _name_stacks(axes, points)
    axes.set_xlim(low, high)
    axes.set_ylim(bottom=min(point.gflops for point in points) / 2)
    axes.xaxis.set_major_locator(LogLocator(base=2))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("operations a byte that must be moved", fontsize=FONT_SIZE, color=INK)
    axes.set_ylabel("GFLOP/s", fontsize=FONT_SIZE, color=INK)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    shapes = [
        Line2D([], [], marker=mark, ls="", ms=7, color=FAINT, label=dtype)
        for dtype, mark in zip(dtypes, MARKERS, strict=False)
    ]
    axes.legend(handles=shapes, loc="lower right", frameon=False, fontsize=FONT_SIZE)
    axes.set_title("Roofline of this run", fontsize=FONT_SIZE + 1, color=INK, loc="left")


def _name_slope(axes: Axes, bandwidth: float, low: float) -> None:
    at = 1.15 * low
    axes.annotate(
        f"read {bandwidth:.1f} GB/s",
        (at, bandwidth * at),
        xytext=(0, 7),
        textcoords="offset points",
        rotation=45,
        rotation_mode="anchor",
        transform_rotates_text=True,
        fontsize=FONT_SIZE,
        color=INK,
    )


def _name_stacks(axes: Axes, points: Sequence[Point]) -> None:
    """The case's name under its lowest point: all series of a case stand on one another."""
    for case in dict.fromkeys(point.case for point in points):
        lowest = min((point for point in points if point.case == case), key=lambda point: point.gflops)
        axes.annotate(
            case.replace(", ", "\n"),
            (lowest.intensity, lowest.gflops),
            xytext=(0, -9),
            textcoords="offset points",
            ha="center",
            va="top",
            fontsize=FONT_SIZE - 2,
            color=FAINT,
        )


def ratio_bars(axes: Axes, bars: Bars, colour: Mapping[str, str]) -> None:
    """Groups of bars by case that rise from 1 where faster and hang from it where slower."""
    plain(axes)
    axes.grid(visible=False, axis="x")
    axes.set_yscale("log", base=2)
    cases = list(dict.fromkeys(case for by_case in bars.values.values() for case in by_case))
    width = 0.82 / max(1, len(bars.values))
    for place, (name, by_case) in enumerate(bars.values.items()):
        for case, ratio in by_case.items():
            x = cases.index(case) + (place - (len(bars.values) - 1) / 2) * width
            axes.bar(x, ratio - 1, 0.9 * width, bottom=1, color=colour[name])
            axes.plot(x, bars.marks[name][case], "D", color=colour[name], ms=4.5, mec=INK, mew=0.6)
            axes.annotate(  # on the side of the line that the bar leaves free
                f"{ratio:.2f}",
                (x, 1),
                xytext=(0, -4 if ratio >= 1 else 4),
                textcoords="offset points",
                ha="center",
                va="top" if ratio >= 1 else "bottom",
                rotation=90,
                fontsize=FONT_SIZE - 2,
                color=INK,
            )
    axes.axhline(1, color=INK, lw=1)
    shown = [ratio for by_case in (*bars.values.values(), *bars.marks.values()) for ratio in by_case.values()]
    axes.set_ylim(min(0.7, *shown) / 1.1, max(1.5, *shown) * 1.2)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xticks(range(len(cases)), [case.replace(", ", "\n") for case in cases])
    axes.set_ylabel("times as fast", fontsize=FONT_SIZE, color=INK)
    axes.set_title(
        f"Bars: beside {bars.label}. Diamonds: beside {bars.marks_label}", fontsize=FONT_SIZE + 1, color=INK, loc="left"
    )
