"""Which items are on every node, which on one, and which on none: decided before items are divided.

Knows nothing of who owns what. Invariant: after `divide`, a node has room for what is replicated and for its share of
what is sharded, with the imbalance that partitions are allowed; an item is evicted only where the memory of all nodes
does not hold every item once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rcllm.cluster.placement import BoolArray, Room
from rcllm.cluster.statistics import FloatArray, IntArray, Statistics
from rcllm.errors import CapacityError

IMBALANCE = 0.05  # the fullest node over the mean, in bytes and in heat
HOT_SHARE = 0.001  # of items that every node holds: RcLLM, Algorithm 1
HEAVY = 0.25  # an item with this share of a node's heat is replicated, where there is room: moves hardly balance it


@dataclass(frozen=True, slots=True)
class Strata:
    """Arrays are [items]; what is in neither is sharded."""

    replicated: BoolArray
    evicted: BoolArray

    @property
    def sharded(self) -> BoolArray:
        return ~(self.replicated | self.evicted)


def divide(statistics: Statistics, room: Room, hot_share: float = HOT_SHARE, heavy: float = HEAVY) -> Strata:
    """The hottest items are replicated while there is room; the coldest per byte are evicted where there is none.

    hot_share: of items that are on each node; heavy: of a node's heat, with which an item is on each node as well.
    Raises CapacityError where no node holds even the smallest item.
    """
    num_bytes, heat = statistics.num_bytes, statistics.heat
    if not statistics.num_items or num_bytes.min() > room.node_bytes:
        smallest = f"the smallest takes {num_bytes.min():,}" if statistics.num_items else "there are no items"
        raise CapacityError(
            f"expected nodes that hold an item, got {room.node_bytes:,} bytes on each, and {smallest}; give more memory"
        )
    evicted = _evicted(statistics, room)
    replicated = np.zeros(statistics.num_items, dtype=np.bool_)
    if evicted.any() or room.num_nodes == 1:
        return Strata(replicated, evicted)
    num_heavy = int((heat > heavy * heat.sum() / room.num_nodes).sum())
    num_hot = max(int(np.ceil(hot_share * statistics.num_items)), num_heavy)
    hottest = np.argsort(-heat, kind="stable")[:num_hot]
    hottest = hottest[heat[hottest] > 0]
    on_each = np.cumsum(num_bytes[hottest])
    owned = np.maximum(_largest_share(num_bytes.sum() - on_each, room), num_bytes.max())
    replicated[hottest[on_each + owned <= room.node_bytes]] = True
    return Strata(replicated, evicted)


def _evicted(statistics: Statistics, room: Room) -> BoolArray:
    """The coldest per byte, down to what all nodes hold together; what is larger than a node first."""
    num_bytes = statistics.num_bytes
    worth = np.where(num_bytes > room.node_bytes, -1.0, statistics.heat / np.maximum(num_bytes, 1))
    kept_first = np.argsort(-worth, kind="stable")
    kept = _largest_share(np.cumsum(num_bytes[kept_first]), room) <= room.node_bytes
    evicted = np.asarray(num_bytes > room.node_bytes)
    evicted[kept_first[~kept]] = True
    return evicted


def _largest_share(num_bytes: IntArray, room: Room) -> FloatArray:
    """Bytes of the fullest node, where the nodes own so many in all."""
    return num_bytes * (1.0 + IMBALANCE) / room.num_nodes
