"""specattn-bench: one subcommand a question. Knows the list of questions and nothing about their answers."""

from __future__ import annotations

import os

import click

from specattn_bench import (
    acceptance,
    dispatch,
    endurance,
    languages,
    mixed,
    reference,
    resources,
    search,
    selection,
    sparse,
    sweep,
    throughput,
    verify,
)
from specattn_codegen.cli import console

QUESTIONS: tuple[click.Command, ...] = (
    verify.command,
    selection.command,
    sparse.command,
    mixed.command,
    reference.command,
    throughput.command,
    acceptance.command,
    sweep.command,
    endurance.command,
    search.command,
    dispatch.command,
    resources.command,
    languages.command,
)
HELP = """How fast are the kernels, beside what else there is and beside what this machine can do at all?

Every question times its series in turns, on data no cache holds, and prints medians, its peers in the same run, and
the distance to a ceiling measured in that same run. What was not run here is labelled modelled.
"""

group = click.Group(
    name="specattn-bench",
    commands=QUESTIONS,
    help=HELP,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)


# Torch's own switch, read at its first tensor: peers have the huge pages that our cache asks for.
TORCH_HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"


def main() -> None:
    os.environ.setdefault(TORCH_HUGE_PAGES, "1")
    console.run(group)
