"""A short table of a campaign's folder, for the end of a log."""

from __future__ import annotations

from pathlib import Path

from benchmarks.gpu.journal import ARCHIVE, Fact, Journal

WIDTH = 44


def text(folder: Path) -> str:
    """One line a step that ended, the newest word on each, with its seconds and the first of what it found."""
    facts = {fact.key: fact for fact in Journal(folder=folder, revision="").facts() if fact.status != "started"}
    lines = [f"{key:{WIDTH}} {fact.status:7} {fact.seconds:7.1f} s  {_gist(fact)}" for key, fact in facts.items()]
    done = sum(fact.status == "done" for fact in facts.values())
    return "\n".join([*lines, f"{done} done, {len(facts) - done} failed; packed in {folder / ARCHIVE}"])


def _gist(fact: Fact) -> str:
    answer = fact.answer
    if "error" in answer:
        return str(answer["error"]).strip().splitlines()[-1][:100]
    plain = {name: value for name, value in answer.items() if isinstance(value, (str, int, float)) and name != "note"}
    shown = [f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in plain.items()]
    if isinstance(wrong := answer.get("wrong"), list):
        shown.append(f"wrong {len(wrong)}")
    return ", ".join(shown).replace("\n", " ")[:100]
