"""Published systems as presets: which scores choose the keys a draft reads, and which keys are always kept."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from specattn_codegen.errors import SpecError
from specattn_codegen.spec import ScoreSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """How drafts choose their keys.

    score       scores that verification emits; None ranks keys by position instead, the newest first
    min_budget  keys selected where the budget's share of the prefix is smaller
    sink        first keys, always selected, inside the budget
    recent      last keys of the prefix, always selected, inside the budget
    drafts      False decodes one token a pass
    """

    name: str
    summary: str
    score: ScoreSpec | None
    min_budget: int
    sink: int = 0
    recent: int = 0
    drafts: bool = True

    def __post_init__(self) -> None:
        for name in ("min_budget", "sink", "recent"):
            if getattr(self, name) < 0:
                raise SpecError(f"{name}={getattr(self, name)}: must be at least 0 keys")

    @property
    def uses_references(self) -> bool:
        """Whether scores are normalised by what the draft steps computed, from the first round with drafts on."""
        return self.score is not None and self.score.normaliser == "reference"


PRESETS = {
    preset.name: preset
    for preset in (
        Preset(
            name="vegas",
            summary="first and last verify row, one selection per layer (arXiv 2602.07223)",
            score=ScoreSpec(rows="ends", heads="layer"),
            min_budget=256,
        ),
        Preset(
            name="pillar",
            summary="all verify rows, one selection per KV head (arXiv 2512.01278)",
            score=ScoreSpec(rows="all", heads="kv_head"),
            min_budget=192,
        ),
        Preset(
            name="reference",
            summary="as pillar, its scores normalised by the draft steps' log-sum-exp: approximate, one pass, no dump",
            score=ScoreSpec(rows="all", heads="kv_head", normaliser="reference"),
            min_budget=192,
        ),
        Preset(
            name="streaming",
            summary="first keys and a window of the newest (arXiv 2309.17453, drafting as in 2408.11049)",
            score=None,
            min_budget=256,
            sink=4,
        ),
        Preset(
            name="dense",
            summary="no drafts, one token a pass",
            score=ScoreSpec(rows="ends", heads="layer"),  # of the prompt's last rows only, as in a speculative run
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
