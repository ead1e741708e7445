"""Gives new items a place without building a placement anew.

Knows nothing of texts: their vectors are given. Invariant: nothing that was placed changes its owner; a new item goes
where most of what is asked for together with it is, else where the item with the nearest text is, else where room is;
halos give way to it, least wanted copies first; it is evicted only where no node has room even so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from rcllm.cluster.placement import Placement
from rcllm.cluster.statistics import FloatArray, IntArray
from rcllm.core.ranking import ItemId
from rcllm.errors import DataError


@dataclass(frozen=True, slots=True)
class NewItem:
    """An item that came after the placement was made."""

    item_id: ItemId
    num_bytes: int
    asked_with: dict[int, float] = field(default_factory=dict)  # by item of the placement: requests that named both
    nearest: tuple[int, ...] = ()  # items of the placement with the most similar texts, the most similar first


def nearest_by_text(vectors: npt.NDArray[np.float32], new: npt.NDArray[np.float32], count: int = 8) -> IntArray:
    """[new items, count] the placed items whose vectors have the largest cosine; rows of length one are expected."""
    alike = new @ vectors.T
    return np.argsort(-alike, axis=1, kind="stable")[:, :count]


def insert(placement: Placement, items: Sequence[NewItem]) -> Placement:
    """The placement with the new items after the old ones. Raises DataError where an item is there already."""
    known = set(placement.item_ids)
    for item in items:
        if item.item_id in known:
            raise DataError(f"expected new items, got {item.item_id!r}, which the placement has; leave it out")
        known.add(item.item_id)
    state = _Filling(placement)
    owners = [state.place(item) for item in items]
    num_new = len(items)
    gone = np.array([owner is None for owner in owners], dtype=np.bool_)
    return replace(
        placement,
        item_ids=placement.item_ids + tuple(item.item_id for item in items),
        num_bytes=np.concatenate([placement.num_bytes, np.array([item.num_bytes for item in items], np.int64)]),
        replicated=np.concatenate([placement.replicated, np.zeros(num_new, np.bool_)]),
        evicted=np.concatenate([placement.evicted, gone]),
        owner=np.concatenate([placement.owner, np.array([owner or 0 for owner in owners], np.int64)]),
        halos=tuple(np.array(halo, np.int64) for halo in state.halos),
    )


class _Filling:
    """The free bytes of nodes, and their halos, while items come."""

    def __init__(self, placement: Placement) -> None:
        num_nodes = placement.room.num_nodes
        self._placement = placement
        self.halos = [halo.tolist() for halo in placement.halos]
        self._free = [placement.room.node_bytes - sum(placement.bytes_of(node).values()) for node in range(num_nodes)]
        self._halo_bytes = [placement.bytes_of(node)["halo"] for node in range(num_nodes)]

    def place(self, item: NewItem) -> int | None:
        """The node that owns it from now on; None where no node has room."""
        wishes = self._wishes(item)
        room = np.array(self._free) + np.array(self._halo_bytes)
        order = np.lexsort((np.arange(len(room)), -room, -wishes))
        node = next((int(each) for each in order if room[each] >= item.num_bytes), None)
        if node is None:
            return None
        while self._free[node] < item.num_bytes:
            least = self.halos[node].pop()
            self._free[node] += int(self._placement.num_bytes[least])
            self._halo_bytes[node] -= int(self._placement.num_bytes[least])
        self._free[node] -= item.num_bytes
        return node

    def _wishes(self, item: NewItem) -> FloatArray:
        """[nodes] how much speaks for each: requests in common with what it owns, else nearness of texts."""
        wishes = np.zeros(len(self._free))
        sharded, owner = self._placement.sharded, self._placement.owner
        for other, weight in item.asked_with.items():
            if sharded[other]:
                wishes[owner[other]] += weight
        if not wishes.any():
            for rank, other in enumerate(item.nearest):
                if sharded[other]:
                    wishes[owner[other]] += 0.5**rank
        return wishes
