"""What has changed since a cluster began: items put, removed and placed elsewhere, users who were erased.

Never imports ray or torch. Replicas read it up to a version, those that come back as well, before they answer.
Invariant: whoever has read up to a version knows every change of it; of an item, and of placements, only the last
change is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rcllm.core.ranking import Item, ItemId, UserId
from rcllm.server.backend import Change, EraseUser, PlaceItems, PutItems, RemoveItems


@dataclass(frozen=True, slots=True)
class _Put:
    version: int
    item: Item | None  # None: it was removed
    codes: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class Page:
    """The changes between two versions."""

    version: int  # up to which it goes
    changes: tuple[Change, ...]


class Ledger:
    """Not thread-safe: one event loop, or one actor, works with it."""

    def __init__(self) -> None:
        self.version = 0
        self._items: dict[ItemId, _Put] = {}
        self._erased: dict[tuple[UserId, str], int] = {}
        self._placed: tuple[int, PlaceItems] | None = None  # with its version

    def add(self, change: Change) -> int:
        """Returns the version that the change makes."""
        self.version += 1
        match change:
            case PutItems():
                for item in change.items:
                    put = _Put(self.version, item, change.codes.get(item.item_id, self._codes(item.item_id)))
                    self._items[item.item_id] = put
            case RemoveItems():
                self._items |= {item_id: _Put(self.version, None) for item_id in change.item_ids}
            case EraseUser():
                self._erased[change.user_id, change.tenant] = self.version
            case PlaceItems():
                self._placed = self.version, change
            case _:
                raise AssertionError(f"{change} leaves nothing that a replica has to know later")
        return self.version

    def _codes(self, item_id: ItemId) -> tuple[int, ...] | None:
        """A new text leaves an item's semantic ID as it is."""
        known = self._items.get(item_id)
        return known.codes if known is not None and known.item is not None else None

    def since(self, version: int) -> Page:
        """What whoever has read up to `version` does not know."""
        return Page(self.version, tuple(self._since(version)))

    def _since(self, version: int) -> Iterator[Change]:
        newer = [(item_id, put) for item_id, put in self._items.items() if put.version > version]
        if items := [put.item for _, put in newer if put.item is not None]:
            codes = {item_id: put.codes for item_id, put in newer if put.item is not None and put.codes is not None}
            yield PutItems(tuple(items), codes)
        if gone := tuple(item_id for item_id, put in newer if put.item is None):
            yield RemoveItems(gone)
        for (user_id, tenant), erased in self._erased.items():
            if erased > version:
                yield EraseUser(user_id, tenant)
        if self._placed is not None and self._placed[0] > version:
            yield self._placed[1]

    def adopt(self, other: Ledger) -> None:
        """Takes over all that another one has, where this one has less: it was lost, and began anew."""
        if self.version < other.version:
            self.version, self._items, self._erased = other.version, dict(other._items), dict(other._erased)
            self._placed = other._placed
