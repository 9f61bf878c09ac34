"""Texts to train and measure on: what is held out stays out, and an episode's answers stand where it says."""

from __future__ import annotations

import random

import pytest

from specattn_bench.corpus import Corpus, functions_of, is_held_out, library, names_in, read
from specattn_bench.episodes import KINDS, Episode

SOURCE = b'''
def narrow(pattern, flags):
    """Fewer matches than before."""
    return [each for each in pattern if each.flags & flags]


class Reader:
    def advance(self, amount):
        position = self.position + amount
        self.position = min(position, self.length)
        return position
'''


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    filler = " ".join(f"word{chr(97 + i % 26)}{chr(97 + i // 26)} = {i * i}" for i in range(600)).encode()
    return Corpus(names=("a.py", "b.py"), texts=(SOURCE, filler))


@pytest.mark.parametrize("name", list(KINDS))
@pytest.mark.parametrize(("reach", "length"), [(340, 512), (5000, 8192), (700, 711)])
def test_answers_stand_where_they_are_said_to(corpus: Corpus, name: str, reach: int, length: int) -> None:
    for seed in range(5):
        episode = KINDS[name](random.Random(seed), corpus, reach, length)
        assert len(episode.text) == length
        assert reach <= episode.uses <= length
        for answer in episode.answers:
            assert answer.source + answer.stop - answer.start <= episode.uses <= answer.start < answer.stop
            assert (
                episode.text[answer.start : answer.stop] == episode.text[answer.source :][: answer.stop - answer.start]
            )


@pytest.mark.parametrize("name", list(KINDS))
def test_much_of_what_is_used_are_answers(corpus: Corpus, name: str) -> None:
    def answered(episode: Episode) -> float:
        return sum(answer.stop - answer.start for answer in episode.answers) / (len(episode.text) - episode.uses)

    shares = [answered(KINDS[name](random.Random(seed), corpus, 2000, 4000)) for seed in range(5)]
    assert min(shares) > (0.5 if name == "repeats" else 0.1)


@pytest.mark.parametrize("name", list(KINDS))
def test_a_seed_makes_a_text(corpus: Corpus, name: str) -> None:
    first, again, other = (KINDS[name](random.Random(seed), corpus, 600, 900) for seed in (1, 1, 2))
    assert first == again
    assert first.text != other.text


def test_functions_are_whole_and_sorted_by_length(corpus: Corpus) -> None:
    narrow, advance = functions_of(SOURCE)
    assert narrow.startswith(b"def narrow(")
    assert narrow.endswith(b"flags & flags]\n")
    assert advance.startswith(b"    def advance(")
    filler = corpus.texts[1]  # no Python: its paragraphs stand in
    assert corpus.functions == (*sorted((narrow, advance), key=len), filler)
    assert functions_of(b"print 'another Python'") == []


def test_the_library_is_parted_by_name() -> None:
    names = names_in(library())
    assert names == sorted(set(names))
    assert "argparse.py" in names
    assert not any("test" in name.split("/") for name in names)
    held_out = read(library(), [name for name in names if is_held_out(name)])
    assert 0.02 < len(held_out.names) / len(names) < 0.2
    assert all(text in held_out.joined for text in held_out.texts)
