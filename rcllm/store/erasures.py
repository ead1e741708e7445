"""When each owner was last erased, so that whatever was under way meanwhile is not kept: read, copied or computed.

Knows nothing of blocks. Invariant: `hit` is true for each erasure that ended after `since` was asked for.
"""

from __future__ import annotations

from collections.abc import Collection


class Erasures:
    """Owners go by their one names; None stands for everybody. Not thread-safe: whoever has one locks."""

    def __init__(self) -> None:
        self.now = 0
        self._last: dict[str, int] = {}
        self._all = 0  # when everybody was
        self._under_way: list[int] = []  # what `now` was before each erasure that has not ended

    @property
    def since(self) -> int:
        """For whoever begins something now: erasures that are under way are still to come."""
        return min(self._under_way, default=self.now)

    def add(self, owners: Collection[str] | None) -> None:
        """Owners were erased."""
        self.now += 1
        if owners is None:
            self._last, self._all = {}, self.now
        else:
            self._last |= dict.fromkeys(owners, self.now)

    def begin(self, owners: Collection[str] | None) -> int:
        """Owners are being erased until `end` is called with what this returns."""
        before = self.now
        self._under_way.append(before)
        self.add(owners)
        return before

    def end(self, begun: int) -> None:
        self._under_way.remove(begun)

    def hit(self, owner: str | None, since: int) -> bool:
        """Whether the owner was erased after `since`."""
        return owner is not None and self._last.get(owner, self._all) > since
