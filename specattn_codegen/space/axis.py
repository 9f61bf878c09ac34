"""Axis: one ordered choice of a search space."""

from dataclasses import dataclass

from specattn_codegen.plan import Setting


@dataclass(frozen=True, slots=True)
class Axis:
    """Values in their natural order; a search may treat the position as an integer."""

    name: str
    values: tuple[Setting, ...]
