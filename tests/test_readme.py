"""What the documentation shows: its Python runs as written, its commands have those options, its links hold."""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

import specattn_bench.cli
from specattn_codegen.cli import export, pack, tune
from specattn_runtime.cli import generate

TOP = Path(__file__).parent.parent
PAGES = sorted([*TOP.glob("*.md"), *TOP.glob("docs/*.md"), TOP / "tuned_configs" / "README.md"])
COMMANDS: dict[str, click.Command] = {
    "specattn-tune": tune.command,
    "specattn-pack": pack.command,
    "specattn-export": export.command,
    "specattn-generate": generate.command,
    "specattn-bench": specattn_bench.cli.group,
}


def blocks(page: Path, *languages: str) -> list[str]:
    """The fenced blocks of a page in one of these languages."""
    return [
        text for language, text in re.findall(r"```(\w+)\n(.*?)```", page.read_text(), re.S) if language in languages
    ]


def helps(command: click.Command) -> Iterator[str]:
    yield command.epilog or command.help or ""
    for sub in getattr(command, "commands", {}).values():
        yield from helps(sub)


def shown_commands() -> set[str]:
    """Every command that a page or a help text shows, as one line without its comment."""
    lines = [line for page in PAGES for block in blocks(page, "bash", "sh", "console") for line in block.splitlines()]
    lines += [quoted for page in PAGES for quoted in re.findall(r"`([^`]+)`", page.read_text().replace("\n", " "))]
    lines += [line for command in COMMANDS.values() for text in helps(command) for line in text.splitlines()]
    parts = [part.strip(" $") for line in lines for part in re.split(r"&&|  +| # ", line)]
    return {part.removeprefix("nice ") for part in parts if part.removeprefix("nice ").partition(" ")[0] in COMMANDS}


def test_the_python_of_the_readme_runs() -> None:
    names: dict[str, object] = {}
    for block in blocks(TOP / "README.md", "python"):
        code = compile(block, "README.md", "exec")
        if "model.generate(" not in block:  # needs a model of transformers; tests/test_hf.py has them
            exec(code, names)  # noqa: S102


def test_shown_commands_have_the_options_and_choices_they_are_shown_with() -> None:
    shown = shown_commands()
    assert len(shown) > 30
    for line in shown:
        name, *words = shlex.split(line)
        command = COMMANDS[name]
        if isinstance(command, click.Group) and words and words[0] in command.commands:
            command = command.commands[words.pop(0)]
        options = {flag: option for option in command.params for flag in option.opts}
        for word, following in itertools.pairwise([*words, ""]):
            if word.startswith("--"):
                assert word in options or word == "--help", line
                kind = options[word].type if word in options else None
                if isinstance(kind, click.Choice):
                    assert following in kind.choices, line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(TOP)))
def test_links_lead_to_files(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        assert link.startswith("http") or (page.parent / link.partition("#")[0]).exists(), link
