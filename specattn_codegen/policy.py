"""How many keys to select, and by which rule. Budgets are integer arithmetic, so host and device agree exactly."""

from __future__ import annotations

from dataclasses import dataclass

from specattn_codegen.errors import SpecError

PPM = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class TopK:
    """The k keys with the largest scores, ties going to the smaller index.

    TopK(k=2048) takes a fixed number; TopK(ratio=0.05, min=256, max=4096) takes
    `clamp(ceil(ratio_ppm * prefix / 10**6), min, max)`, with ratio_ppm the ratio in whole millionths.
    Either way a prefix no longer than k is selected whole.
    """

    k: int | None = None
    ratio: float | None = None
    min: int = 0
    max: int | None = None

    def __post_init__(self) -> None:
        if (self.k is None) == (self.ratio is None):
            raise SpecError(f"TopK(k={self.k}, ratio={self.ratio}): give exactly one of k and ratio")
        if self.k is not None and self.k < 1:
            raise SpecError(f"TopK(k={self.k}): must select at least 1 key; use draft_len 0 to switch speculation off")
        if self.k is not None and (self.min or self.max is not None):
            raise SpecError(f"TopK(k={self.k}, min={self.min}, max={self.max}): min and max go with ratio, not with k")
        if self.ratio is not None and not 0.0 < self.ratio <= 1.0:
            raise SpecError(f"TopK(ratio={self.ratio}): must be above 0 and at most 1")
        if self.min < 0 or (self.max is not None and self.max < max(self.min, 1)):
            raise SpecError(f"TopK(min={self.min}, max={self.max}): needs 0 <= min <= max and max >= 1")

    @property
    def ratio_ppm(self) -> int:
        """The ratio in millionths, rounded to nearest; 0 for a fixed k."""
        return 0 if self.ratio is None else max(1, round(self.ratio * PPM))

    def budget(self, prefix: int) -> int:
        """Keys to select out of `prefix`; the forced first and recent keys count inside it."""
        if prefix <= 0:
            return 0
        if self.k is not None:
            return min(self.k, prefix)
        wanted = max(-(-self.ratio_ppm * prefix // PPM), self.min)
        return min(wanted if self.max is None else min(wanted, self.max), prefix)


Policy = TopK


def selection_width(policy: Policy, max_prefix: int, sink: int, recent: int) -> int:
    """K: columns that hold any row's selection, forced keys included."""
    return min(max_prefix, max(policy.budget(max_prefix), sink + recent))
