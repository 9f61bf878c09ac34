"""Outbox: what a run found on its way to disk. What no disk takes waits in memory and is tried again with the next."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic, TypeVar

from specattn_codegen.errors import DISK_ERRORS, UnsavedError

logger = logging.getLogger("specattn")

Item = TypeVar("Item")
Other = TypeVar("Other")


@dataclass(slots=True)
class Outbox(Generic[Item]):
    """Items for one place, oldest first.

    place   what people know it by
    save    puts one there; raises OSError
    name    what people know an item by, a line
    reason  why the disk took no more, in its own words; empty before that
    """

    place: Path | None
    save: Callable[[Item], object]
    name: Callable[[Item], str]
    waiting: list[Item] = field(default_factory=list)
    reason: str = ""

    def send(self, items: Sequence[Item] = ()) -> None:
        """Saves `items` after what still waits. A disk that refuses is no error here: see require_saved."""
        self.waiting.extend(items)
        try:
            while self.waiting:
                self.save(self.waiting[0])
                self.waiting.pop(0)
        except OSError as error:
            if error.errno not in DISK_ERRORS:
                raise
            if not self.reason:
                logger.warning("%s: %s; what is found waits in memory.", self.place, error.strerror)
            self.reason = f"{self.place}: {error.strerror}"

    def names_left(self) -> list[str]:
        """What the disk still does not take."""
        self.send()
        return list(map(self.name, self.waiting))


def require_saved(first: Outbox[Item], second: Outbox[Other]) -> None:
    """Tries once more, and raises UnsavedError with the name of everything that is left."""
    left = [*first.names_left(), *second.names_left()]
    if left:
        raise UnsavedError(
            f"{second.reason or first.reason}; {len(left)} results are not saved. Free some space, or choose writable "
            "folders, and run the same command again: what was saved is not tried twice\n"
            + "\n".join(f"  not saved: {one}" for one in left)
        )
