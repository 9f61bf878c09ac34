"""What a request does in a round and what it gets out of it."""

from __future__ import annotations

from dataclasses import dataclass

from specattn_codegen.errors import SpecError
from specattn_codegen.policy import TopK
from specattn_runtime.decoding.sampling import GREEDY, Sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One request's part in a round.

    tokens     what is not in the cache yet: the newest emitted token, or the end of a prompt that joins
    draft_len  drafts to make after the newest token; 0 for a prompt
    joins      whether the tokens end a prompt: nothing was drafted from there yet
    policy     keys the next drafts read, where this round selects them anew; None keeps the ones it has
    sampling   how its tokens are chosen
    uniforms   2 * draft_len + 1 numbers in [0, 1) of its own, unless it is greedy: for drawing each draft, then for
               accepting each, and for the token that follows
    """

    tokens: tuple[int, ...]
    draft_len: int = 0
    joins: bool = False
    policy: TopK | None = None
    sampling: Sampling = GREEDY
    uniforms: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not self.tokens or (len(self.tokens) > 1 and not self.joins):
            raise SpecError(
                f"{len(self.tokens)} tokens: a turn has its newest one, or with joins=True the end of a prompt"
            )
        if self.draft_len < 0 or (self.joins and self.draft_len):
            raise SpecError(f"draft_len={self.draft_len}: must be at least 0, and 0 for a prompt that joins")
        needed = 0 if self.sampling.greedy else 2 * self.draft_len + 1
        if needed and len(self.uniforms) != needed:
            raise SpecError(f"{len(self.uniforms)} uniforms: sampling with draft_len={self.draft_len} takes {needed}")

    @property
    def rows(self) -> int:
        """Rows it verifies."""
        return len(self.tokens) + self.draft_len


@dataclass(frozen=True, slots=True, kw_only=True)
class Emitted:
    """What a round gave one request: tokens, and by how much the full model's best logit beat its second there; the
    last token is the full model's own, those before it are drafts that held, out of `drafted`."""

    tokens: list[int]
    margins: list[float]
    drafted: int
