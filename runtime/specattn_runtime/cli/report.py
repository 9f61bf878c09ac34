"""How a decoding run is shown, while it runs and after. Knows results, not how they came about."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from rich.table import Table

from specattn_runtime.decoding.generation import Difference, Generation, RequestResult
from specattn_runtime.decoding.session import Session

Line = tuple[str, Callable[[Generation], str]]
SHOWN_REQUESTS = 8  # of a batch, while it runs

LINES: tuple[Line, ...] = (
    ("new tokens", lambda run: f"{run.new_tokens}"),
    ("full-cache passes", lambda run: f"{run.full_passes}"),
    ("tokens/s, decode", lambda run: f"{run.decode_rate:.1f}"),
    ("tokens/s, with prefill", lambda run: f"{run.total_rate:.1f}"),
    ("prefill", lambda run: f"{run.prefill_seconds:.3f} s"),
    ("decode", lambda run: f"{run.decode_seconds:.3f} s"),
    ("  draft", lambda run: _phase(run, "draft")),
    ("  verify", lambda run: _phase(run, "verify")),
    ("  select", lambda run: _phase(run, "select")),
    ("  other", lambda run: _share(run, run.decode_seconds - sum(run.phases.values()))),
    ("keys selected for drafts", lambda run: f"{run.selected_share:.1%} of the prefix" if run.drafted else "-"),
    ("accepted length per round", lambda run: _accepted(run) if run.drafted else "-"),
    ("rounds by accepted length", lambda run: _histogram(run) if run.drafted else "-"),
)


def _phase(run: Generation, name: str) -> str:
    return _share(run, run.phases.get(name, 0.0))


def _share(run: Generation, seconds: float) -> str:
    return f"{seconds:.3f} s ({seconds / run.decode_seconds:.0%})"


def _accepted(run: Generation) -> str:
    return f"{run.mean_accepted:.2f} of {run.mean_drafted:.2f} drafts ({run.mean_accepted + 1:.2f} tokens)"


def _histogram(run: Generation) -> str:
    return "  ".join(f"{length}: {rounds}" for length, rounds in run.accepted_histogram.items())


def run_table(title: str, runs: Mapping[str, Generation]) -> Table:
    """One column a run, named as in `runs`."""
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for name in runs:
        table.add_column(name)
    for label, show in LINES:
        table.add_row(label, *(show(run) for run in runs.values()))
    return table


def live_table(session: Session, seconds: float) -> Table:
    """A session `seconds` after its start: a line a running request, the first ones of many, and one for all."""
    cache, waiting = session.cache, len(session.waiting)
    used = cache.num_pages - cache.free_pages
    table = Table(title=f"round {session.rounds}, {used} of {cache.num_pages} pages", title_justify="left")
    for heading in ("prompt", "tokens", "tokens/s", "accepted a round", "drafted a round"):
        table.add_column(heading, justify="right")
    for number in session.running[:SHOWN_REQUESTS]:
        table.add_row(str(number + 1), *_live_cells([session.result(number)], seconds))
    state = f"{len(session.running)} running" + (f", {waiting} waiting" if waiting else "")
    table.add_row(state, *_live_cells([session.result(number) for number in range(session.total)], seconds))
    return table


def _live_cells(results: list[RequestResult], seconds: float) -> list[str]:
    tokens = sum(len(result.tokens) for result in results)
    rounds = max(1, sum(len(result.drafted) for result in results))
    accepted = sum(sum(result.accepted) for result in results) / rounds
    drafted = sum(sum(result.drafted) for result in results) / rounds
    return [str(tokens), f"{tokens / seconds:.1f}" if seconds else "-", f"{accepted:.2f}", f"{drafted:.2f}"]


def identical_line(difference: Difference | None, *, float32: bool) -> str:
    """`identical: yes`, or where the runs part and by how much the dense run preferred its token there."""
    if difference is None:
        return "identical: yes"
    tie = ": a tie of rounding" if float32 and difference.is_rounding_tie else ""
    return f"identical: no (token {difference.token}, top-2 margin {difference.margin:.3g}{tie})"
