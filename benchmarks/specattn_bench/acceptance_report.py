"""Tokens a round as numbers and tables. Runs nothing."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from specattn_bench import tables
from specattn_bench.acceptance_study import EVERYTHING, FORCED, GENERATED, SERIES, Case, Observed
from specattn_bench.acceptance_texts import LONG_RANGE, SETS, Passage
from specattn_runtime.decoding.presets import PRESETS

BASELINE = "streaming"
# Whose keys are chosen by what a verification scored.
GUIDED = tuple(name for name in SERIES if name != EVERYTHING and PRESETS[name].ranking == "scores")
FAR = 4096  # tokens from which a context counts as long
LEGEND = (
    "Tokens a round: 1 and the drafts that hold. forced: expected along the text, 1 and the sums of products of",
    "sum(min(p, q)). greedy, sampled at temperature 0.6: in what the engine generates.",
    "Every series selects as many prefix keys, quest up to 15 more to fill its pages; everything selects all.",
    "+-: standard error, over passages, of the difference from streaming.",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """tokens: a round, the mean over passages; error: of its difference from streaming; beside: over streaming's.
    agreeing: forced, tokens that greedy decoding would keep. by_kind: tokens by the passages' kind;
    holding: forced, the mean chance that a draft holds, by PLACES."""

    mode: str
    text_set: str
    context: int
    case: Case
    tokens: float
    error: float | None
    beside: float | None
    agreeing: float | None
    passages: int
    by_kind: Mapping[str, float]
    holding: Mapping[str, float]

    def facts(self) -> dict[str, object]:
        return {
            "mode": self.mode,
            "text": self.text_set,
            "context": self.context,
            "series": self.case.series,
            "budget": self.case.budget,
            "draft_len": self.case.draft_len,
            "tokens_a_round": round(self.tokens, 4),
            "error": tables.rounded(self.error),
            "of_streaming": tables.rounded(self.beside),
            "agreeing_a_round": tables.rounded(self.agreeing),
            "passages": self.passages,
            **({"by_kind": {kind: round(tokens, 4) for kind, tokens in self.by_kind.items()}} if self.varied else {}),
            **(
                {"holding": {place: round(chance, 4) for place, chance in self.holding.items()}} if self.holding else {}
            ),
        }

    @property
    def varied(self) -> bool:
        return len(self.by_kind) > 1


def summarise(observed: Sequence[Observed], passages: Sequence[Passage]) -> list[Summary]:
    """One summary a mode, set, context and case, in the order they came."""
    cells: dict[tuple[str, str, int, Case], dict[int, Observed]] = {}
    for one in observed:
        passage = passages[one.passage]
        cells.setdefault((one.mode, passage.text_set, passage.context, one.case), {})[one.passage] = one
    found: list[Summary] = []
    for (mode, text_set, context, case), mine in cells.items():
        rival = Case(series=BASELINE, budget=case.budget, draft_len=case.draft_len)
        theirs = cells.get((mode, text_set, context, rival))
        tokens = statistics.fmean(one.tokens for one in mine.values())
        agreeing = [one.agreeing for one in mine.values() if one.agreeing is not None]
        found.append(
            Summary(
                mode=mode,
                text_set=text_set,
                context=context,
                case=case,
                tokens=tokens,
                error=standard_error([mine[key].tokens - theirs[key].tokens for key in mine]) if theirs else None,
                beside=tokens / statistics.fmean(one.tokens for one in theirs.values()) if theirs else None,
                agreeing=statistics.fmean(agreeing) if agreeing else None,
                passages=len(mine),
                by_kind=means((passages[one.passage].kind, [one.tokens]) for one in mine.values()),
                holding=means(part for one in mine.values() for part in one.holding.items()),
            )
        )
    return found


def means(parts: Iterable[tuple[str, Sequence[float]]]) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for name, values in parts:
        found.setdefault(name, []).extend(values)
    return {name: statistics.fmean(values) for name, values in found.items()}


def standard_error(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One of the study's questions: what was found, and what is wanted of it."""

    question: str
    found: float
    wanted: str
    met: bool


def findings(summaries: Sequence[Summary], *, budget: float, draft_len: int) -> list[Finding]:
    """Of teacher-forced cells at that budget and draft length; none where the series it takes were not measured."""
    cells = [
        one for one in summaries if one.mode == FORCED and one.case.draft_len == draft_len and one.case.budget == budget
    ]

    def of(series: str, text_set: str, least: int = 0) -> list[float]:
        return [
            one.tokens
            for one in cells
            if (one.case.series, one.text_set) == (series, text_set) and one.context >= least
        ]

    found: list[Finding] = []
    for text_set, least, ratio in ((LONG_RANGE, FAR, 1.3), (SETS[0], 0, 1.0)):
        rival = of(BASELINE, text_set, least)
        scored = {name: statistics.fmean(of(name, text_set, least)) for name in GUIDED if of(name, text_set, least)}
        if rival and scored:
            best = max(scored, key=lambda name: scored[name])
            beside = scored[best] / statistics.fmean(rival)
            where = f", contexts from {least}" if least else ""
            question = f"{text_set}{where}: {best}, the best guided by verification, over {BASELINE}"
            found.append(Finding(question=question, found=beside, wanted=f">= {ratio}", met=beside >= ratio))
    for text_set in SETS:
        twins = of("reference", text_set), of("pillar", text_set)
        if all(twins):
            beside = statistics.fmean(twins[0]) / statistics.fmean(twins[1])
            question = f"{text_set}: reference over pillar, its exact twin"
            found.append(Finding(question=question, found=beside, wanted="within 5 %", met=abs(beside - 1) <= 0.05))
    everything = [one for text_set in SETS for one in of(EVERYTHING, text_set)]
    if everything:
        least_tokens = min(everything)
        question = f"every key selected: tokens a round, of {draft_len + 1}"
        met = least_tokens > draft_len + 1 - 1e-3
        found.append(Finding(question=question, found=least_tokens, wanted="all accepted", met=met))
    return found


Key = Callable[[Summary], object]


def show(
    summaries: Sequence[Summary], answers: Sequence[Finding], *, budget: float, draft_len: int, screen: Console
) -> None:
    """Against context at one budget and draft length, then against these at the longest context; then the findings."""
    usual = [one for one in summaries if one.case.budget == budget and one.case.draft_len == draft_len]
    for mode in (FORCED, *GENERATED):
        for text_set in SETS:
            mine = [one for one in usual if (one.mode, one.text_set) == (mode, text_set)]
            _print(screen, f"{mode}, {text_set}: {budget:.0%}, {draft_len} drafts", mine, lambda one: one.context)
    far = [one for one in usual if one.mode == FORCED and one.text_set == LONG_RANGE and one.context >= FAR]
    _print_parts(screen, f"{FORCED}, {LONG_RANGE}: by kind", far, lambda one: one.by_kind)
    _print_parts(
        screen, "chance that a draft holds, of an answer's first byte, others, all else", far, lambda one: one.holding
    )
    for text_set in SETS:
        mine = [one for one in summaries if (one.mode, one.text_set) == (FORCED, text_set)]
        longest = max((one.context for one in mine), default=0)
        mine = [one for one in mine if one.context == longest]
        by_budget = [one for one in mine if one.case.draft_len == draft_len]
        title = f"{FORCED}, {text_set}, context {longest}"
        _print(screen, f"{title}: {draft_len} drafts", by_budget, lambda one: f"{one.case.budget:.0%}")
        by_length = [one for one in mine if one.case.budget == budget]
        _print(screen, f"{title}: {budget:.0%}", by_length, lambda one: f"{one.case.draft_len} drafts")
    for answer in answers:
        verdict = "met" if answer.met else "MISSED"
        screen.print(f"{answer.question}: {answer.found:.3f} (wanted {answer.wanted}): {verdict}", soft_wrap=True)
    tables.print_lines(screen, LEGEND)


def _print(screen: Console, title: str, cells: Sequence[Summary], column: Key) -> None:
    columns = list(dict.fromkeys(map(column, cells)))
    if not columns:
        return
    table = tables.table(title, ("series", *(part for name in columns for part in (str(name), "+-", "of streaming"))))
    for series in dict.fromkeys(one.case.series for one in cells):
        mine = {column(one): one for one in cells if one.case.series == series}
        table.add_row(series, *(part for name in columns for part in _cells(mine.get(name))))
    screen.print(table)


def _print_parts(
    screen: Console, title: str, cells: Sequence[Summary], parts_of: Callable[[Summary], Mapping[str, float]]
) -> None:
    parts = sorted({(part, one.context) for one in cells for part in parts_of(one)})
    if not parts:
        return
    table = tables.table(title, ("series", *(f"{part} {context}" for part, context in parts)))
    for series in dict.fromkeys(one.case.series for one in cells):
        mine = {
            (part, one.context): f"{found:.2f}"
            for one in cells
            if one.case.series == series
            for part, found in parts_of(one).items()
        }
        table.add_row(series, *(mine.get(part, "") for part in parts))
    screen.print(table)


def _cells(one: Summary | None) -> tuple[str, str, str]:
    if one is None:
        return "", "", ""
    error = "" if one.error is None else f"{one.error:.2f}"
    return f"{one.tokens:.2f}", error, "" if one.beside is None else f"{one.beside:.2f}"


def write_grid(path: Path, title: str, summaries: Sequence[Summary]) -> None:
    """Every cell as Markdown: a table a mode, set and context, with a column a budget and draft length."""
    lines = [f"# {title}", "", *LEGEND[:-1]]
    for mode, text_set, context in dict.fromkeys((one.mode, one.text_set, one.context) for one in summaries):
        mine = [one for one in summaries if (one.mode, one.text_set, one.context) == (mode, text_set, context)]
        columns = sorted({(one.case.draft_len, one.case.budget) for one in mine})
        heads = [f"{drafts} drafts, {budget:.0%}" for drafts, budget in columns]
        lines += [
            "",
            f"## {mode}, {text_set}, context {context}",
            "",
            _row("series", heads),
            "|---" * (len(heads) + 1) + "|",
        ]
        for series in dict.fromkeys(one.case.series for one in mine):
            tokens = {
                (one.case.draft_len, one.case.budget): f"{one.tokens:.2f}" for one in mine if one.case.series == series
            }
            lines.append(_row(f"`{series}`", [tokens.get(column, "") for column in columns]))
    path.write_text("\n".join(lines) + "\n")


def _row(name: str, cells: Sequence[str]) -> str:
    return f"| {name} | {' | '.join(cells)} |"
