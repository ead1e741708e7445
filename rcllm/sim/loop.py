"""The event loop: a heap of events under a virtual clock. Knows nothing of nodes, requests or costs.

Events at one moment have a defined order: first by their kind, as `EventKind` lists them, then in the order in which
they were scheduled. Invariant: time never goes back, and one schedule gives one history.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from enum import IntEnum
from typing import Any


class EventKind(IntEnum):
    """Who goes first where several things happen at one moment.

    Machines fail before work ends on them, work ends before other work arrives, and a pass starts last, so that it
    takes along everything that has arrived by then.
    """

    NODE = 0  # a machine fails or comes back
    PASS_END = 1
    FETCHED = 2  # the blocks that a request waits for are there
    UPDATE = 3  # an item has a new text
    VIEW = 4  # the router learns what nodes hold
    ARRIVAL = 5
    PASS_START = 6


Action = Callable[[Any], None]


class Loop:
    """Runs what was scheduled, in order. `now`: seconds since the simulation began."""

    def __init__(self) -> None:
        self.now = 0.0
        self.num_events = 0
        self._heap: list[tuple[float, int, int, Action, Any]] = []
        self._scheduled = 0
        self._ended = False

    def at(self, time_s: float, kind: EventKind, action: Action, argument: Any = None) -> None:
        """Calls `action(argument)` at that time, which must not have passed."""
        assert time_s >= self.now, f"an event at {time_s} s was scheduled at {self.now} s"
        self._scheduled += 1
        heapq.heappush(self._heap, (time_s, kind, self._scheduled, action, argument))

    def run(self, until_s: float = float("inf")) -> None:
        """Runs every event up to that time, and those that they schedule."""
        heap = self._heap
        while heap and heap[0][0] <= until_s and not self._ended:
            self.now, _, _, action, argument = heapq.heappop(heap)
            self.num_events += 1
            action(argument)

    def end(self) -> None:
        """Nothing that is scheduled happens any more."""
        self._ended = True

    @property
    def is_empty(self) -> bool:
        return not self._heap
