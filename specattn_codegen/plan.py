"""Plan: how to compute. One point of a search space; it knows nothing about what is computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from specattn_codegen.errors import SpecError

Backend = Literal["cpu", "triton", "tilelang"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)
Setting = int | str


@dataclass(frozen=True, slots=True)
class Plan:
    """A backend and its settings by name; equal plans are equal whatever the order they were given in."""

    backend: Backend
    settings: tuple[tuple[str, Setting], ...]

    @classmethod
    def of(cls, backend: Backend, **settings: Setting) -> Plan:
        if backend not in BACKENDS:
            raise SpecError(f"backend={backend!r}: must be one of {', '.join(BACKENDS)}")
        return cls(backend, tuple(sorted(settings.items())))

    def __getitem__(self, name: str) -> Setting:
        for known, value in self.settings:  # quicker than a dict of so few, and asked millions of times a search
            if known == name:
                return value
        raise KeyError(name)

    def get(self, name: str) -> Setting | None:
        return next((value for known, value in self.settings if known == name), None)

    def integer(self, name: str) -> int:
        value = self[name]
        if not isinstance(value, int):
            raise SpecError(f"plan setting {name}={value!r}: must be a whole number")
        return value

    def replace(self, **changes: Setting) -> Plan:
        return Plan.of(self.backend, **{**self.as_dict(), **changes})

    def as_dict(self) -> dict[str, Setting]:
        return dict(self.settings)

    def __str__(self) -> str:
        return f"{self.backend} " + " ".join(f"{name}={value}" for name, value in self.settings)
