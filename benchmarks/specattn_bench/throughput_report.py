"""What was played as numbers: speeds, where a round's time goes, what the cost formula says of it. Runs nothing."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console

from specattn_bench import tables
from specattn_bench.plots import FAINT, FONT_SIZE, INK, OURS, PEERS, colours, plain
from specattn_bench.throughput_measured import Case, Played, law_of
from specattn_codegen.tuning.measure import summary
from specattn_codegen.tuning.outcome import Timing
from specattn_runtime.decoding.draft_length import RoundCosts, expected_tokens
from specattn_runtime.decoding.generation import RequestResult, first_difference
from specattn_runtime.decoding.presets import preset_named

DENSE, GENERATE, SCORELESS = "dense", "transformers generate", "streaming"
PHASES = ("draft", "verify", "select", "other")
COLUMNS = (
    *("series", "round", "overhead", "parts", "tokens", "tokens/s"),
    *("x dense", "formula", "perfect", "best", "x generate"),
)
LONGEST_DRAFT = 16  # that is considered for the best
LEGEND = (
    "round: one pass over the whole cache, with its drafts. parts: draft, verify, select and other, percent of it.",
    "overhead: selection, and what verification takes longer than that of streaming, which has no scores; quest's is",
    "part of its drafts.",
    "tokens: of a request, a round. formula: tokens * dense step / (drafts * draft step + verify + select), of the",
    "medians of the same run; perfect: the same if every draft held; best: the same for the best draft length, in",
    "brackets, if drafts go on to hold as often and a verified row costs what it costs here.",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Parted:
    """How a series' texts compare with the dense ones, over as many tokens as both have.

    margins: of each request that parts, the dense model's between its best and second token there, the largest first"""

    tokens: int
    requests: int
    margins: list[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One series of a case.

    round           of a step
    tokens          it gives a request, mean; tokens_of, of the requests that continue one kind of text
    phases          seconds, medians, of presets
    parted          None where acceptance was given, and texts mean nothing
    """

    case: Case
    series: str
    draft_len: int
    round: Timing
    tokens: float
    tokens_of: Mapping[str, float]
    phases: Mapping[str, float]
    parted: Parted | None

    @property
    def seconds(self) -> float:
        return self.round.median_us / 1e6

    @property
    def rate(self) -> float:
        """Tokens a second, of the whole batch."""
        return self.case.batch * self.tokens / self.seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """A line beside others of its case; None where its case has no such other.

    formula, perfect    times dense that the cost formula says, for the tokens of this run and for all drafts holding
    best_len, best      the draft length for which it says most, and what it says there
    scores              seconds of verification that scores cost
    overhead            scores and selection, as a share of a round
    """

    line: Line
    times_dense: float | None
    times_generate: float | None
    formula: float | None
    perfect: float | None
    best_len: int | None
    best: float | None
    scores: float | None
    overhead: float | None


def line_of(case: Case, series: str, draft_len: int, played: Sequence[Played], dense: Sequence[Played] | None) -> Line:
    """dense: what the dense contender played, where texts are to be compared."""
    steps = [step for turn in played for step in turn.steps]
    phases = {name: statistics.median(step.phases[name] for step in steps) for name in steps[0].phases}
    if phases:
        phases["other"] = statistics.median(step.seconds - sum(step.phases.values()) for step in steps)
    return Line(
        case=case,
        series=series,
        draft_len=draft_len,
        round=summary([step.seconds * 1e6 for step in steps]),
        tokens=statistics.mean(step.tokens for step in steps),
        tokens_of=tokens_by_kind(played) if draft_len else {},
        phases=phases,
        parted=None if dense is None else parted(played, dense),
    )


def tokens_by_kind(played: Sequence[Played]) -> dict[str, float]:
    """Tokens a round of the requests that continue each kind of text."""
    rounds: dict[str, list[int]] = {}
    for turn in played:
        for kind, one in zip(turn.kinds, turn.results, strict=True):
            rounds.setdefault(kind, []).extend(count + 1 for count in one.accepted)
    return {kind: statistics.mean(tokens) for kind, tokens in rounds.items()}


def parted(played: Sequence[Played], dense: Sequence[Played]) -> Parted:
    """Turns of equal number continue the same prompts."""
    pairs = [
        _shared(*pair)
        for turns in zip(played, dense, strict=False)
        for pair in zip(turns[0].results, turns[1].results, strict=True)
    ]
    differences = [first_difference(*pair) for pair in pairs]
    margins = [difference.margin for difference in differences if difference is not None]
    return Parted(
        tokens=sum(len(one.tokens) for one, _ in pairs), requests=len(pairs), margins=sorted(margins, reverse=True)
    )


def _shared(one: RequestResult, other: RequestResult) -> tuple[RequestResult, RequestResult]:
    length = min(len(one.tokens), len(other.tokens))
    first, second = (
        RequestResult(tokens=each.tokens[:length], margins=each.margins[:length], accepted=(), drafted=())
        for each in (one, other)
    )
    return first, second


def standings(lines: Sequence[Line]) -> list[Standing]:
    return [_standing(line, {other.series: other for other in lines if other.case == line.case}) for line in lines]


def _standing(line: Line, beside: Mapping[str, Line]) -> Standing:
    dense, plain_generate, scoreless = (beside.get(name) for name in (DENSE, GENERATE, SCORELESS))
    drafts = line.draft_len > 0
    costs = sum(line.phases.get(name, 0.0) for name in ("draft", "verify", "select"))
    speed = dense.seconds / costs if dense and drafts else None
    best_len, best = best_draft_len(line, dense) if dense and drafts else (None, None)
    in_drafts = drafts and preset_named(line.series).uses_page_bounds  # which select at every step of their own
    scores = line.phases["verify"] - scoreless.phases["verify"] if scoreless and drafts and not in_drafts else None
    return Standing(
        line=line,
        times_dense=line.rate / dense.rate if dense else None,
        times_generate=line.rate / plain_generate.rate if plain_generate else None,
        formula=None if speed is None else line.tokens * speed,
        perfect=None if speed is None else (line.draft_len + 1) * speed,
        best_len=best_len,
        best=best,
        scores=scores,
        overhead=None if scores is None else (max(0.0, scores) + line.phases["select"]) / line.seconds,
    )


def best_draft_len(line: Line, dense: Line) -> tuple[int, float]:
    """The draft length of most tokens a second, and how many times as fast as dense steps it is.

    Drafts hold at the rate that gives the line's tokens; verification costs as a line through its own and a dense step.
    """
    rate = law_of(line.tokens - 1, line.draft_len).rate
    row = max(0.0, line.phases["verify"] - dense.phases["verify"]) / line.draft_len
    costs = RoundCosts(
        step=line.phases["draft"] / line.draft_len,
        verification=line.phases["verify"] - row * (line.draft_len + 1) + line.phases["select"],
        row=row,
    )
    speeds = {
        drafts: expected_tokens(rate, drafts) * dense.seconds / costs.seconds(drafts, drafts + 1)
        for drafts in range(1, LONGEST_DRAFT + 1)
    }
    best = max(speeds, key=lambda drafts: speeds[drafts])
    return best, speeds[best]


def result(standing: Standing) -> dict[str, object]:
    """One series as a flat JSON object."""
    line = standing.line
    facts: dict[str, object] = {"series": line.series, **line.case.facts(), **tables.timing_facts(line.round)}
    facts |= {f"{name}_us": round(seconds * 1e6, 1) for name, seconds in line.phases.items()}
    facts |= {
        "draft_len": line.draft_len,
        "tokens_per_round": round(line.tokens, 4),
        "tokens_per_round_by_text": {kind: round(tokens, 4) for kind, tokens in line.tokens_of.items()},
        "tokens_per_second": round(line.rate, 2),
        "times_dense": tables.rounded(standing.times_dense),
        "times_dense_by_formula": tables.rounded(standing.formula),
        "times_dense_if_all_drafts_held": tables.rounded(standing.perfect),
        "best_draft_len_by_formula": standing.best_len,
        "times_dense_at_best_draft_len": tables.rounded(standing.best),
        "times_generate": tables.rounded(standing.times_generate),
        "scores_us": None if standing.scores is None else round(standing.scores * 1e6, 1),
        "scores_and_selection_share": tables.rounded(standing.overhead),
    }
    if line.parted is not None:
        facts |= {
            "compared_tokens": line.parted.tokens,
            "compared_requests": line.parted.requests,
            "margins_where_requests_part_from_dense": [float(f"{margin:.3g}") for margin in line.parted.margins],
        }
    return facts


def show(found: Sequence[Standing], title: str, screen: Console) -> None:
    table = tables.table(title, COLUMNS)
    for case in dict.fromkeys(one.line.case for one in found):
        table.add_row(case.name, style="bold")
        for one in (one for one in found if one.line.case == case):
            table.add_row(f"  {one.line.series}", *cells(one))
        table.add_section()
    screen.print(table)
    tables.print_lines(screen, [*kinds_lines(found), *texts_lines(found), *LEGEND])


def kinds_lines(found: Sequence[Standing]) -> list[str]:
    """Tokens a round by kind of text, where there are several, and the speed that a batch of that text alone has."""
    return [
        f"{one.line.case.name}, {one.line.series}: "
        + ", ".join(
            f"{kind} {tokens:.2f} tokens, {one.times_dense * tokens / one.line.tokens:.2f} x dense"
            for kind, tokens in one.line.tokens_of.items()
        )
        for one in found
        if len(one.line.tokens_of) > 1 and one.times_dense is not None
    ]


def texts_lines(found: Sequence[Standing]) -> list[str]:
    """Whether texts are the dense ones, by dtype."""
    lines: list[str] = []
    for dtype in dict.fromkeys(one.line.case.dtype for one in found):
        compared = [
            one.line.parted
            for one in found
            if one.line.parted is not None and one.line.case.dtype == dtype and one.line.draft_len
        ]
        margins = [margin for one in compared for margin in one.margins]
        if compared:
            tokens, requests = (sum(getattr(one, name) for one in compared) for name in ("tokens", "requests"))
            told = f"{dtype}: {tokens} tokens of {requests} requests beside dense decoding: "
            lines.append(
                told
                + (f"{len(margins)} part, at a top-2 margin of at most {max(margins):.3g}" if margins else "identical")
            )
    return lines


def cells(standing: Standing) -> tuple[str, ...]:
    line = standing.line
    return (
        tables.timing_cells(line.round)[0],
        "" if standing.overhead is None else f"{standing.overhead:.1%}",
        " ".join(f"{100 * line.phases[name] / line.seconds:2.0f}" for name in PHASES if name in line.phases),
        f"{line.tokens:.2f}",
        f"{line.rate:.1f}",
        *(_times(ratio) for ratio in (standing.times_dense, standing.formula, standing.perfect)),
        "" if standing.best is None else f"{standing.best:.2f} ({standing.best_len})",
        _times(standing.times_generate),
    )


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}"


def draw(path: Path, title: str, found: Sequence[Standing]) -> None:
    """Speed beside dense decoding, with the formula's, and where a round's time goes; the suffix decides the format."""
    cases = list(dict.fromkeys(one.line.case for one in found))
    figure = Figure(figsize=(14, 2.5 + 1.3 * len(cases)), layout="constrained", facecolor="white")
    left, right = figure.subplots(1, 2, sharey=True)
    figure.suptitle(title, fontsize=FONT_SIZE + 3, color=INK, x=0.01, ha="left")
    names = list(dict.fromkeys(one.line.series for one in found))
    colour = colours([name for name in names if name != GENERATE], [GENERATE])
    _speeds(left, cases, found, names, colour)
    _phases(right, cases, found, names)
    left.set_ylim(len(cases) - 0.5, -0.5)
    left.set_yticks(range(len(cases)), [case.name.replace(", ", "\n", 1) for case in cases])
    for axes in (left, right):
        handles, labels = axes.get_legend_handles_labels()
        unique = dict(zip(labels, handles, strict=True))
        axes.legend(
            list(unique.values()),
            list(unique),
            loc="upper center",
            bbox_to_anchor=(0.5, -0.02 - 0.15 / len(cases)),
            ncols=5,
            frameon=False,
            fontsize=FONT_SIZE,
        )
    figure.savefig(path, dpi=150)


def _bars(case: int, series: str, names: Sequence[str]) -> tuple[float, float]:
    """Where a series' bar stands, and its height."""
    height = 0.84 / len(names)
    return case + (names.index(series) - (len(names) - 1) / 2) * height, 0.9 * height


def _speeds(
    axes: Axes, cases: Sequence[Case], found: Sequence[Standing], names: Sequence[str], colour: Mapping[str, str]
) -> None:
    plain(axes)
    axes.tick_params(axis="y", length=0)
    for one in found:
        if one.times_dense is None:
            continue
        y, height = _bars(cases.index(one.line.case), one.line.series, names)
        axes.barh(y, one.times_dense, height, color=colour[one.line.series], label=one.line.series)
        if one.formula is not None and one.perfect is not None:
            axes.plot(one.formula, y, "D", color="white", mec=INK, ms=4, mew=0.8, label="cost formula")
            axes.plot(one.perfect, y, "|", color=INK, ms=7, mew=1.4, label="formula, all drafts held")
    axes.axvline(1, color=FAINT, lw=1)
    axes.set_xlabel("times as fast as dense decoding by the same kernels", fontsize=FONT_SIZE, color=INK)


def _phases(axes: Axes, cases: Sequence[Case], found: Sequence[Standing], names: Sequence[str]) -> None:
    plain(axes)
    axes.tick_params(axis="y", length=0)
    shades = dict(zip(PHASES, (OURS[1], OURS[0], PEERS[1], PEERS[2]), strict=True))
    for one in found:
        if not one.line.draft_len:
            continue
        y, height = _bars(cases.index(one.line.case), one.line.series, names)
        start = 0.0
        for name in PHASES:
            milliseconds = one.line.phases[name] * 1e3
            axes.barh(y, milliseconds, height, left=start, color=shades[name], label=name)
            start += milliseconds
    axes.set_xlabel("milliseconds of a round, by phase", fontsize=FONT_SIZE, color=INK)
