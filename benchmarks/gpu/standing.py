"""Where a campaign's answers stand: beside the ceilings of their run, their peers, and what was aimed at."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import msgspec

Answers = Mapping[str, Mapping[str, object]]
UNMASKED = "nothing masked"  # of a peer whose rows see each other, which is other work where there are several
SCORED = "matmuls, with scores"
PAPER_TOKENS = 6.24  # a round of 6 drafts, at 7 % of the keys (arXiv 2602.07223)
PAPER_KEYS = 102_400


class Timing(msgspec.Struct, frozen=True, kw_only=True):
    median_us: float


class Least(msgspec.Struct, frozen=True, kw_only=True):
    memory_bytes: int
    operations: int


class Series(msgspec.Struct, frozen=True, kw_only=True):
    """One way to do a race's work; a peer has no least work of its own, and no timing where it refused."""

    timing: Timing | None = None
    least: Least | None = None
    refused: str = ""


class Sizes(msgspec.Struct, frozen=True, kw_only=True):
    batch: int
    q_len: int
    kv_len: int

    @property
    def name(self) -> str:
        return f"{self.batch} requests, {self.q_len} row{'s' if self.q_len > 1 else ''}, {self.kv_len // 1024}K keys"


class Race(msgspec.Struct, frozen=True, kw_only=True):
    workload: Sizes
    series: dict[str, Series]

    @property
    def median_us(self) -> dict[str, float]:
        """Of every series that ran."""
        return {name: one.timing.median_us for name, one in self.series.items() if one.timing}


class Parts(msgspec.Struct, frozen=True, kw_only=True):
    """A round's parts: `draft` is one draft step, `dense` one token without drafts."""

    batch: int
    kv_len: int
    draft_len: int
    fits_memory: bool
    timings: dict[str, Timing]

    def us(self, part: str) -> float:
        return self.timings[part].median_us

    def speed_up(self, tokens: float) -> float:
        """Over dense decoding, where a round emits so many tokens on average."""
        parts = self.draft_len * self.us("draft") + self.us("verify") + self.us("select")
        return tokens * self.us("dense") / parts


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What was aimed at, and the worst that was found over `cases`; None where it was not measured."""

    name: str
    wanted: str
    found: float | None
    is_met: bool | None
    cases: int

    @property
    def shown(self) -> str:
        return "not measured" if self.found is None else f"{self.found:.2f}"


def races(answers: Answers, kind: str, ends: str = "") -> list[Race]:
    """Of a kind as in `verify`, `flex`, `sparse`, `select`, and a case whose name ends so."""
    keys = [key for key in answers if key.startswith(f"peers/{kind}/") and key.endswith(ends)]
    return [msgspec.convert(answers[key], Race) for key in keys]


def rounds(answers: Answers) -> dict[str, Parts]:
    """By the step's key."""
    return {key: msgspec.convert(answers[key], Parts) for key in answers if key.startswith("rounds/")}


def read_gbs(answers: Answers) -> float | None:
    found = answers.get("ceilings/read", {}).get("gbs")
    return found if isinstance(found, float) else None


def share_of_read(race: Race, name: str, gbs: float) -> float:
    """The bytes a series of ours cannot avoid over its time, as a share of the read ceiling."""
    least = race.series[name].least
    if least is None:
        raise ValueError(f"{name} is a peer: only ours say what they cannot avoid")
    return least.memory_bytes / race.median_us[name] / 1e3 / gbs


def peers_of(race: Race) -> dict[str, float]:
    """Medians of the peers that do the same work without scores."""
    return {
        name: median
        for name, median in race.median_us.items()
        if race.series[name].least is None and name != SCORED and not (race.workload.q_len > 1 and UNMASKED in name)
    }


def best_peer_ratios(answers: Answers) -> list[float]:
    """How many times as fast as the fastest peer verification without scores is, in every race there was."""
    found = [race for kind in ("verify", "flashinfer", "flex") for race in races(answers, kind)]
    return [min(others.values()) / race.median_us["no scores"] for race in found if (others := peers_of(race))]


def _fastest(race: Race, scores: str) -> str:
    """Our fastest way to these scores; the plans of other methods are named after what they make."""
    names = [name for name in race.median_us if name.split(",")[0] == scores and race.series[name].least]
    return min(names, key=race.median_us.__getitem__)


def _over_none(verified: Sequence[Race], scores: str) -> list[float]:
    return [race.median_us[_fastest(race, scores)] / race.median_us["no scores"] - 1.0 for race in verified]


def targets(answers: Answers) -> list[Target]:
    """Every aim, with the worst case of the run."""
    return [*_verification_targets(answers), *_draft_targets(answers), *_round_targets(answers)]


def _verification_targets(answers: Answers) -> list[Target]:
    gbs, verified = read_gbs(answers), races(answers, "verify")
    shares = [share_of_read(race, "no scores", gbs) for race in verified] if gbs else []
    floors = [1.0 / share_of_read(race, _fastest(race, "all"), gbs) for race in verified] if gbs else []
    return [
        _least("verification: share of the read ceiling", 0.90, shares),
        _least("verification: times as fast as its best peer", 1.0, best_peer_ratios(answers)),
        _most("scores, reference: time over none", 0.03, _over_none(verified, "reference")),
        _most("scores, first and last row: time over none", 0.08, _over_none(verified, "ends")),
        _most("scores, all rows: time over the floor of its bytes", 1.2, floors),
    ]


def _draft_targets(answers: Answers) -> list[Target]:
    gbs = read_gbs(answers)

    def shares(block: int) -> list[float]:
        ends = f"-block{block}"
        return [share_of_read(race, "ours", gbs) for race in races(answers, "sparse", ends)] if gbs else []

    medians = [race.median_us for race in races(answers, "select")]
    gains = [found["torch.topk"] / found["ours"] for found in medians if "torch.topk" in found]
    return [
        _least("sparse attention, keys one by one: share of the read ceiling", 0.60, shares(1)),
        _least("sparse attention, pages of 16: share of the read ceiling", 0.80, shares(16)),
        _least("selection: times as fast as torch.topk", 5.0, gains),
    ]


def _round_targets(answers: Answers) -> list[Target]:
    parts = list(rounds(answers).values())
    graphs = [float(answer.get("same_bits") is True) for key, answer in answers.items() if key.startswith("graphs/")]
    papers = f"speed-up over dense decoding at {PAPER_KEYS // 1024}K keys, {PAPER_TOKENS} tokens a round"
    return [
        _most("selection of all layers: share of a round", 0.03, [one.us("select") / one.us("whole") for one in parts]),
        _least("a whole round is one CUDA graph with the same bits (1: yes)", 1.0, graphs),
        _least(papers, 2.81, [one.speed_up(PAPER_TOKENS) for one in parts if one.kv_len == PAPER_KEYS]),
    ]


def _least(name: str, wanted: float, found: Sequence[float]) -> Target:
    return _target(name, f"at least {wanted:g}", found, min, lambda worst: worst >= wanted)


def _most(name: str, wanted: float, found: Sequence[float]) -> Target:
    return _target(name, f"at most {wanted:g}", found, max, lambda worst: worst <= wanted)


def _target(
    name: str,
    wanted: str,
    found: Sequence[float],
    worst_of: Callable[[Sequence[float]], float],
    is_met: Callable[[float], bool],
) -> Target:
    worst = worst_of(found) if found else None
    met = None if worst is None else is_met(worst)
    return Target(name=name, wanted=wanted, found=worst, is_met=met, cases=len(found))
