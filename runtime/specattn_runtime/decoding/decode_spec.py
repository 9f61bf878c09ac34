"""DecodeSpec: how to decode, whatever the model and the prompts."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from specattn_codegen.errors import SpecError
from specattn_codegen.policy import TopK
from specattn_codegen.spec import require_type
from specattn_runtime.decoding.presets import Preset
from specattn_runtime.decoding.sampling import GREEDY, Sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeSpec:
    """preset            how drafts choose their keys, or that there are none
    draft_len         drafts a round; without drafts it only splits the prefill as the speculative run does
    adaptive          make fewer drafts where that gives more tokens a second, by what rounds have cost and how often
                      drafts have held. Sampled texts then depend on the clock: same distribution, not same text
    budget            keys that drafts read, as a share of the prefix, above 0 and at most 1
    refresh_interval  rounds that drafts read the same keys for, beside all newer ones
    sampling          how tokens are chosen
    max_new_tokens    tokens each request gets, unless it ends with a stop token before
    page_size         keys per page of the KV cache
    stop_tokens       tokens that end a request
    """

    preset: Preset
    draft_len: int = 6
    adaptive: bool = False
    budget: float = 0.07
    refresh_interval: int = 1
    sampling: Sampling = GREEDY
    max_new_tokens: int = 256
    page_size: int = 16
    stop_tokens: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        fix = "a Preset, as preset_named('vegas') of specattn_runtime.decoding.presets"
        require_type("preset", self.preset, Preset, fix)
        if self.draft_len < 1:
            raise SpecError(
                f"draft_len={self.draft_len}: must be at least 1; to decode without drafts use preset dense"
            )
        if not 0.0 < self.budget <= 1.0:
            raise SpecError(f"budget={self.budget}: must be above 0 and at most 1, a share of the keys; try 0.07")
        for name in ("refresh_interval", "max_new_tokens", "page_size"):
            if getattr(self, name) < 1:
                raise SpecError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.preset.uses_page_bounds and self.refresh_interval > 1:
            raise SpecError(
                f"refresh_interval={self.refresh_interval}: preset {self.preset.name} chooses its keys anew at every "
                "draft step; leave it at 1"
            )

    @property
    def policy(self) -> TopK:
        return TopK(ratio=self.budget, min=self.preset.min_budget)

    def without_drafts(self) -> DecodeSpec:
        """The same run decoded densely: the prompt goes through the same operations, then one token a pass."""
        return dataclasses.replace(self, preset=dataclasses.replace(self.preset, name="dense", drafts=False))
