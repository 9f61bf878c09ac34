"""Published systems as presets: which scores choose the keys a draft reads, and which keys are always kept."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Literal, get_args

from specattn_codegen.errors import SpecError
from specattn_codegen.spec import ScoreSpec, require_choice

Ranking = Literal["scores", "newest", "random", "page-bounds"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """How drafts choose their keys.

    ranking       scores that verification emits; newest first; at random; or pages, anew at every draft step, by the
                  most that its query can score in them
    score         the scores, where those rank
    min_budget    keys selected where the budget's share of the prefix is smaller
    sink          first keys, always selected, inside the budget
    recent        last keys of the prefix, always selected, inside the budget
    recent_share  share of the budget that goes to the last keys of the prefix, whatever their rank
    ahead         keys behind a scored one that count as much as it: a text that is repeated goes on there
    drafts        False decodes one token a pass
    """

    name: str
    summary: str
    min_budget: int
    ranking: Ranking = "scores"
    score: ScoreSpec | None = None
    sink: int = 0
    recent: int = 0
    recent_share: float = 0.0
    ahead: int = 0
    drafts: bool = True

    def __post_init__(self) -> None:
        require_choice("ranking", self.ranking, get_args(Ranking))
        if (self.ranking == "scores") != (self.score is not None):
            raise SpecError(f"ranking={self.ranking!r}, score={self.score}: scores, and nothing else, need a ScoreSpec")
        for name in ("min_budget", "sink", "recent", "ahead"):
            if getattr(self, name) < 0:
                raise SpecError(f"{name}={getattr(self, name)}: must be at least 0 keys")
        if not 0.0 <= self.recent_share <= 1.0:
            raise SpecError(
                f"recent_share={self.recent_share}: must be at least 0 and at most 1, a share of the budget"
            )

    @property
    def uses_references(self) -> bool:
        """Whether scores are normalised by what the draft steps computed, from the first round with drafts on."""
        return self.score is not None and self.score.normaliser == "reference"

    @property
    def uses_page_bounds(self) -> bool:
        return self.ranking == "page-bounds"


VEGAS = ScoreSpec(rows="ends", heads="layer")
PILLAR = ScoreSpec(rows="all", heads="kv_head")

PRESETS = {
    preset.name: preset
    for preset in (
        Preset(
            name="vegas",
            summary="first and last verify row, one selection per layer (arXiv 2602.07223)",
            score=VEGAS,
            min_budget=256,
        ),
        Preset(
            name="pillar",
            summary="all verify rows, one selection per KV head (arXiv 2512.01278)",
            score=PILLAR,
            min_budget=192,
        ),
        Preset(
            name="reference",
            summary="as pillar, its scores normalised by the draft steps' log-sum-exp: approximate, one pass, no dump",
            score=ScoreSpec(rows="all", heads="kv_head", normaliser="reference"),
            min_budget=192,
        ),
        Preset(
            name="hybrid",
            summary="half the budget for the newest keys, half by the scores of vegas",
            score=VEGAS,
            min_budget=256,
            recent_share=0.5,
        ),
        Preset(
            name="hybrid-pillar",
            summary="half the budget for the newest keys, half by the scores of pillar",
            score=PILLAR,
            min_budget=192,
            recent_share=0.5,
        ),
        Preset(
            name="lookahead",
            summary="a quarter of the budget newest keys, the rest by pillar's scores with the 7 keys behind each",
            score=PILLAR,
            min_budget=192,
            recent_share=0.25,
            ahead=7,
        ),
        Preset(
            name="streaming",
            summary="first keys and a window of the newest (arXiv 2309.17453, drafting as in 2408.11049)",
            ranking="newest",
            min_budget=256,
            sink=4,
        ),
        Preset(
            name="quest",
            summary="pages by their bounds, one selection per KV head and draft step (arXiv 2406.10774)",
            ranking="page-bounds",
            min_budget=256,
        ),
        Preset(
            name="random",
            summary="keys at random: what any rule must beat",
            ranking="random",
            min_budget=256,
        ),
        Preset(
            name="dense",
            summary="no drafts, one token a pass",
            score=VEGAS,  # of the prompt's last rows only, as in a speculative run
            min_budget=0,
            drafts=False,
        ),
    )
}
PLANNED = ("draft-guided", "nsa-verify")


def preset_named(name: str) -> Preset:
    """The preset of that name. Raises SpecError, offering the nearest name, when there is none."""
    if name in PRESETS:
        return PRESETS[name]
    available = f"available: {', '.join(PRESETS)}"
    if name in PLANNED:
        raise SpecError(f"preset={name!r}: planned, not available yet; {available}")
    nearest = difflib.get_close_matches(name, PRESETS, n=1)
    hint = f"did you mean {nearest[0]}? " if nearest else ""
    raise SpecError(f"preset={name!r}: unknown; {hint}{available}")
