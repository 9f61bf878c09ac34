"""How a decoding run is shown. Knows results, not how they came about."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from rich.table import Table

from specattn_runtime.generation import Difference, Generation

Line = tuple[str, Callable[[Generation], str]]

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


def identical_line(difference: Difference | None, *, float32: bool) -> str:
    """`identical: yes`, or where the runs part and by how much the dense run preferred its token there."""
    if difference is None:
        return "identical: yes"
    tie = ": a tie of rounding" if float32 and difference.is_rounding_tie else ""
    return f"identical: no (token {difference.token}, top-2 margin {difference.margin:.3g}{tie})"
