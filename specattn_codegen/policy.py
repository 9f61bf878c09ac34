"""How many keys to select, and by which rule. Budgets are integer arithmetic, so host and device agree exactly."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING

from specattn_codegen.errors import SpecError

if TYPE_CHECKING:
    import torch

PPM = 1_000_000
MASS_TOLERANCE = 2.0**-20  # of a row's total: how far from `p` the mass of a TopP selection may be decided


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
            raise SpecError(f"TopK(k={self.k}): must select at least 1 key; use preset dense to decode without drafts")
        if self.k is not None and (self.min or self.max is not None):
            raise SpecError(f"TopK(k={self.k}, min={self.min}, max={self.max}): min and max go with ratio, not with k")
        if self.ratio is not None and not 0.0 < self.ratio <= 1.0:
            raise SpecError(f"TopK(ratio={self.ratio}): must be above 0 and at most 1")
        _require_bounds("TopK", self.min, self.max)

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

    def most_keys(self, prefix: int) -> int:
        """Most keys it selects out of `prefix`, unless more are forced."""
        return self.budget(prefix)


@dataclass(frozen=True, slots=True)
class TopP:
    """The fewest keys whose scores sum to the share p of the row's total: largest first, then the smaller index.

    The sum is decided within MASS_TOLERANCE of the total; p=1 takes every key with a score above 0. Forced keys count
    towards it. min and max bound the selected keys, the forced ones included. Scores are masses, finite and not
    negative, normalised or not. A row without any mass gets its forced keys, filled to `min` with the newest.

    bisection_steps=n takes instead all keys at or above the largest threshold which n halvings of [0, largest score]
    show to hold the mass: the fixed-iteration search of SpecAttn (arXiv 2510.27641, n = 10). It reads scores n times
    and selects more keys than needed, so it is another rule and not another way to compute this one.
    """

    p: float
    _: KW_ONLY
    min: int = 0
    max: int | None = None
    bisection_steps: int | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.p <= 1.0:
            raise SpecError(f"TopP(p={self.p}): must be at least 0 and at most 1, a share of the row's mass")
        if self.bisection_steps is not None and self.bisection_steps < 1:
            raise SpecError(f"TopP(bisection_steps={self.bisection_steps}): must be at least 1; None searches exactly")
        _require_bounds("TopP", self.min, self.max)

    def most_keys(self, prefix: int) -> int:
        """Most keys it selects out of `prefix`, unless more are forced."""
        return max(0, prefix if self.max is None else min(self.max, prefix))


@dataclass(frozen=True, slots=True)
class Threshold:
    """Every key whose score is at least `value`, as with thresholds calibrated per head (Top-Theta).

    value is one number, or a float32 tensor on the scores' device that broadcasts to the score rows: [S] for one per
    head, [B, S] for one per row, [L, 1, S] for one per layer and head. A NaN in it, like NaN below every score, selects
    the whole row, so that a head nobody calibrated stays dense.
    """

    value: float | torch.Tensor

    def __post_init__(self) -> None:
        if isinstance(self.value, (int, float)) and math.isnan(self.value):
            raise SpecError("Threshold(nan): must be a number; -inf selects every key whose score is one")

    def most_keys(self, prefix: int) -> int:
        """Most keys it selects out of `prefix`: all of them."""
        return max(0, prefix)


Policy = TopK | TopP | Threshold
MAX_KEYS = 2**30  # of one row of scores, so that positions and budgets are 32-bit


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyNumbers:
    """A policy as kernels take it: policy 0 top-k, 1 top-p, 2 threshold; k 0 where the budget is a ratio of the prefix.

    The threshold is that of all rows, where the policy has one number for them.
    """

    policy: int
    k: int = 0
    ratio_ppm: int = 0
    min_keys: int = 0
    max_keys: int = MAX_KEYS
    share: float = 0.0
    bisection_steps: int = 0
    threshold: float = 0.0


def policy_numbers(policy: Policy) -> PolicyNumbers:
    """The numbers of a policy; max_keys is MAX_KEYS where it has none."""
    if isinstance(policy, Threshold):
        return PolicyNumbers(policy=2, threshold=policy.value if isinstance(policy.value, (int, float)) else 0.0)
    least, most = min(policy.min, MAX_KEYS), MAX_KEYS if policy.max is None else min(policy.max, MAX_KEYS)
    if isinstance(policy, TopK):
        k = min(policy.k or 0, MAX_KEYS)
        return PolicyNumbers(policy=0, k=k, ratio_ppm=policy.ratio_ppm, min_keys=least, max_keys=most)
    steps = policy.bisection_steps or 0
    return PolicyNumbers(policy=1, share=policy.p, bisection_steps=steps, min_keys=least, max_keys=most)


def _require_bounds(policy: str, least: int, most: int | None) -> None:
    if least < 0 or (most is not None and most < max(least, 1)):
        raise SpecError(f"{policy}(min={least}, max={most}): needs 0 <= min <= max and max >= 1")


def blocks_of(keys: int, block: int) -> int:
    """Blocks of `block` keys that hold `keys` keys."""
    return -(-keys // block)


def selection_width(policy: Policy, max_prefix: int, sink: int, recent: int, block: int = 1, union: int = 1) -> int:
    """K: columns, each of `block` keys, that hold any row's selection out of `max_prefix` keys, forced keys included,
    or the union of `union` such rows, which may have nothing in common.

    The recent keys touch a block more than they fill where they begin inside one.
    """
    touched = blocks_of(recent - 1, block) + 1 if recent else 0
    wanted = blocks_of(policy.most_keys(max_prefix), block)
    return min(blocks_of(max_prefix, block), union * max(wanted, blocks_of(sink, block) + touched))
