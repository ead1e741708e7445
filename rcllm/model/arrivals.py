"""KV that is still on its way while a pass runs: each layer waits for the part that it reads, and for no more.

Knows nothing of tiers or of who copies. Never imports torch. Invariant: once a pass has waited for a layer, all that it
reads up to that layer is there for whatever the device is given next; the host has waited for nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol


class Mark(Protocol):
    """A point in a row of copies, as `torch.cuda.Event` is one."""

    def wait(self) -> None:
        """What the device is given from here on comes after it. Returns at once."""

    def query(self) -> bool:
        """Whether the device has passed it."""

    def synchronize(self) -> None:
        """Waits until the device has passed it."""


@dataclass(frozen=True, slots=True)
class Part:
    """Some layers of several blocks."""

    first_layer: int
    mark: Mark  # behind their copies


@dataclass(frozen=True, slots=True, eq=False)
class Arriving:
    """Blocks that are copied together, part by part: the lowest layers first, and all of them before the last mark."""

    parts: tuple[Part, ...]

    @property
    def is_over(self) -> bool:
        return self.parts[-1].mark.query()

    def wait(self) -> None:
        """Whatever reads, overwrites or moves them from here on comes after their copies."""
        self.parts[-1].mark.wait()


class Arrivals:
    """What one pass waits for."""

    def __init__(self, arriving: Iterable[Arriving]) -> None:
        parts = (part for each in arriving for part in each.parts)
        self._left = deque(sorted(parts, key=lambda part: part.first_layer))

    @property
    def starts(self) -> frozenset[int]:
        """The first layers of its parts, while any of them is not there yet."""
        is_there = all(part.mark.query() for part in self._left)
        return frozenset() if is_there else frozenset(part.first_layer for part in self._left)

    def wait(self, layer: int) -> None:
        """To be called before each layer, or before several with the last of them."""
        while self._left and self._left[0].first_layer <= layer:
            self._left.popleft().mark.wait()
