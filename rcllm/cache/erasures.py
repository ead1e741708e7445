"""When each owner was last erased, so that whatever was under way meanwhile is not kept."""

from __future__ import annotations


class Erasures:
    """Not thread-safe: whoever has one locks."""

    def __init__(self) -> None:
        self.now = 0
        self._last: dict[str, int] = {}

    def add(self, owner: str) -> None:
        self.now += 1
        self._last[owner] = self.now

    def hit(self, owner: str | None, since: int) -> bool:
        """Whether the owner was erased after `since`, a former `now`."""
        return owner is not None and self._last.get(owner, 0) > since
