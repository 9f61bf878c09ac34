"""What was recorded of every method as numbers, a table and a picture. Runs nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from rich import box
from rich.console import Console
from rich.table import Table

from specattn_bench.plots import FAINT, FONT_SIZE, GRID, INK, OURS, PEERS
from specattn_bench.reference_methods import METHODS
from specattn_bench.reference_study import Recorded

SHORT_EDGES = (1.0, 2.0, 4.0)  # nats
ROUNDING = ("exact", "dump-log", "dump-linear")
REFERENCES = ("reference", "corrected", "highest", "dropped", "neighbour", "neighbour-corrected", "capped", "previous")
LEGEND = (
    "overlap: share of the exact top k selected too. mass: exact scores selected, of the exact top k's; 1 %: of the",
    "worst hundredth of layers, heads and rounds. coming: the next round's attention to the keys that could be",
    "selected which falls on those that were. accepted: drafts a round under sampling, expected; greedy: leading",
    "drafts that agree. +-: standard error, over passages, of the difference from exact. off: worst error of a score",
    "in tolerances of bfloat16 kernels.",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mean:
    """A mean over passages, and the standard error of its difference from the exact method's."""

    value: float
    error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Short:
    """How well references select where the worst of them is short by at least `above` nats: share of cases, overlap."""

    above: float
    share: float
    overlap: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    method: str
    budget: float
    overlap: Mean
    mass: Mean
    mass_worst: float
    coming: Mean
    accepted: Mean
    greedy: Mean
    overlap_by_layer: list[list[float]]
    short: list[Short]
    off: float | None


def over_passages(values: torch.Tensor, exact: torch.Tensor) -> Mean:
    """values and exact [B], one a passage."""
    different = (values - exact).double()
    error = different.std().item() / math.sqrt(len(different)) if len(different) > 1 else math.nan
    return Mean(value=values.double().mean().item(), error=error)


def summarise(method: str, budget: float, recorded: Recorded, exact: Recorded) -> Summary:
    def by_passage(values: torch.Tensor) -> torch.Tensor:
        return values.double().mean(dim=(0, 1, 3))

    return Summary(
        method=method,
        budget=budget,
        overlap=over_passages(by_passage(recorded.overlap), by_passage(exact.overlap)),
        mass=over_passages(by_passage(recorded.mass), by_passage(exact.mass)),
        mass_worst=recorded.mass.flatten().quantile(0.01).item(),
        coming=over_passages(by_passage(recorded.coming), by_passage(exact.coming)),
        accepted=over_passages(recorded.accepted.mean(dim=0), exact.accepted.mean(dim=0)),
        greedy=over_passages(recorded.matched.mean(dim=0), exact.matched.mean(dim=0)),
        overlap_by_layer=recorded.overlap.mean(dim=(0, 2)).tolist(),
        short=[] if recorded.short is None else by_shortfall(recorded.short, recorded.overlap),
        off=None if recorded.error is None else recorded.error.max().item(),
    )


def by_shortfall(short: torch.Tensor, overlap: torch.Tensor) -> list[Short]:
    """Cases by how far their worst reference is short."""
    found = []
    for above, below in zip((-math.inf, *SHORT_EDGES), (*SHORT_EDGES, math.inf), strict=True):
        inside = (short >= above) & (short < below)
        mean = overlap[inside].mean().item() if bool(inside.any()) else None
        found.append(Short(above=max(0.0, above), share=inside.double().mean().item(), overlap=mean))
    return found


def show(summaries: Sequence[Summary], title: str, screen: Console) -> None:
    budgets = list(dict.fromkeys(one.budget for one in summaries))
    middle = budgets[len(budgets) // 2]
    screen.print(title, markup=False)
    screen.print(_overlaps(summaries, budgets))
    screen.print(f"at a budget of {middle:.0%}")
    screen.print(_rest([one for one in summaries if one.budget == middle]))
    for one in summaries:
        if one.method == "reference" and one.budget == middle:
            parts = [
                f"{part.above:g} nats or more: {part.overlap:.2f} ({part.share:.0%} of cases)"
                for part in one.short
                if part.overlap is not None
            ]
            screen.print(f"reference, overlap where the worst reference is short by {'; '.join(parts)}", soft_wrap=True)
    for line in LEGEND:
        screen.print(line, soft_wrap=True)


def _table(columns: Sequence[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column, justify="left" if column == "scores" else "right", no_wrap=True)
    return table


def _overlaps(summaries: Sequence[Summary], budgets: Sequence[float]) -> Table:
    table = _table(("scores", *(f"overlap at {budget:.0%}" for budget in budgets)))
    for method in dict.fromkeys(one.method for one in summaries):
        cells = [f"{one.overlap.value:.3f}" for one in summaries if one.method == method]
        table.add_row(METHODS[method].label, *cells)
    return table


def _rest(summaries: Sequence[Summary]) -> Table:
    table = _table(("scores", "mass", "1 %", "coming", "+-", "accepted", "+-", "greedy", "+-", "off"))
    for one in summaries:
        table.add_row(
            METHODS[one.method].label,
            f"{one.mass.value:.3f}",
            f"{one.mass_worst:.3f}",
            f"{one.coming.value:.3f}",
            f"{one.coming.error:.3f}",
            f"{one.accepted.value:.2f}",
            f"{one.accepted.error:.2f}",
            f"{one.greedy.value:.2f}",
            f"{one.greedy.error:.2f}",
            "" if one.off is None else f"{one.off:.0f}",
        )
    return table


def colours(methods: Sequence[str]) -> Mapping[str, str]:
    """Grey where only rounding differs, cool for references, warm for the rest."""
    palettes = ([INK, FAINT, FAINT], [*OURS, "#1d7874", "#8ab6e8"], list(PEERS))
    taken = [0, 0, 0]
    chosen: dict[str, str] = {}
    for method in methods:
        family = 0 if method in ROUNDING else 1 if method in REFERENCES else 2
        chosen[method] = palettes[family][taken[family] % len(palettes[family])]
        taken[family] += 1
    return chosen


def draw(path: Path, title: str, summaries: Sequence[Summary]) -> None:
    """Overlap, and coming attention beside the exact method's, against the budget; the suffix decides the format."""
    figure = Figure(figsize=(13, 6), layout="constrained", facecolor="white")
    left, right = figure.subplots(1, 2)
    figure.suptitle(title, fontsize=FONT_SIZE + 3, color=INK, x=0.01, ha="left")
    _lines(left, summaries, {(one.method, one.budget): one.overlap for one in summaries})
    _lines(right, summaries, coming_beside_exact(summaries))
    left.set_title("Overlap with the exact top k", fontsize=FONT_SIZE + 1, color=INK, loc="left")
    right.set_title("Next round's attention selected, beside exact", fontsize=FONT_SIZE + 1, color=INK, loc="left")
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False, fontsize=FONT_SIZE)
    figure.savefig(path, dpi=150)


def coming_beside_exact(summaries: Sequence[Summary]) -> dict[tuple[str, float], Mean]:
    exact = {one.budget: one.coming.value for one in summaries if one.method == "exact"}
    return {
        (one.method, one.budget): Mean(value=one.coming.value - exact[one.budget], error=one.coming.error)
        for one in summaries
    }


def _lines(axes: Axes, summaries: Sequence[Summary], means: Mapping[tuple[str, float], Mean]) -> None:
    methods = list(dict.fromkeys(one.method for one in summaries))
    colour = colours(methods)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(visible=True, color=GRID, lw=0.8)
    axes.set_axisbelow(True)
    for method in methods:
        budgets = [one.budget for one in summaries if one.method == method]
        axes.errorbar(
            budgets,
            [means[method, budget].value for budget in budgets],
            yerr=[means[method, budget].error for budget in budgets],
            color=colour[method],
            marker="o",
            ms=4,
            lw=2.4 if method in ("exact", "reference") else 1.2,
            ls={"dump-log": ":", "dump-linear": "--"}.get(method, "-"),
            label=METHODS[method].label,
        )
    axes.xaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
    axes.set_xlabel("selected keys, share of the prefix", fontsize=FONT_SIZE, color=INK)
    axes.tick_params(colors=INK, labelsize=FONT_SIZE)
