"""Holdings of nodes that keep what they last used in the memory that a placement leaves free.

The one part of this room that changes: whoever serves a request tells it so (`served`). Knows nothing of routing.
Invariant: what a node keeps of its own accord fits beside what is placed on it; the least recently used goes first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence

from rcllm.cluster.placement import PlacedHoldings
from rcllm.cluster.view import NOWHERE, Held, RoutedBlock, Stratum


class CachedHoldings:
    """A placement, and beside it an LRU cache on every node. See `view.Holdings`."""

    def __init__(self, placed: PlacedHoldings) -> None:
        room = placed.placement.room
        self._placed = placed
        self._cached: list[OrderedDict[Hashable, int]] = [OrderedDict() for _ in range(room.num_nodes)]  # key → bytes
        used = (sum(placed.bytes_of(node).values()) for node in range(room.num_nodes))
        self._free = [room.node_bytes - num_bytes for num_bytes in used]
        self._held: dict[Hashable, Held] = {}  # of keys that are in a cache

    def held(self, key: Hashable) -> Held:
        return self._held.get(key) or self._placed.held(key)

    def bytes_of(self, node: int) -> Mapping[Stratum, int]:
        return {**self._placed.bytes_of(node), "cached": sum(self._cached[node].values())}

    def served(self, node: int, blocks: Sequence[RoutedBlock]) -> None:
        """A node has used these blocks, and keeps those that it did not hold."""
        cache = self._cached[node]
        for block in blocks:
            if block.key in cache:
                cache.move_to_end(block.key)
            elif not self._is_placed(block.key, node) and self._make_room(node, block.num_bytes):
                cache[block.key] = block.num_bytes
                self._free[node] -= block.num_bytes
                self._set(block.key, (*self.held(block.key).nodes, node))

    def drop(self, node: int) -> None:
        """A node has lost what it kept of its own accord."""
        while self._cached[node]:
            self._evict(node)

    def _is_placed(self, key: Hashable, node: int) -> bool:
        placed = self._placed.held(key)
        return placed.everywhere or node in placed.nodes

    def _make_room(self, node: int, num_bytes: int) -> bool:
        while self._free[node] < num_bytes and self._cached[node]:
            self._evict(node)
        return self._free[node] >= num_bytes

    def _evict(self, node: int) -> None:
        key, num_bytes = self._cached[node].popitem(last=False)
        self._free[node] += num_bytes
        self._set(key, tuple(each for each in self._held[key].nodes if each != node))

    def _set(self, key: Hashable, nodes: tuple[int, ...]) -> None:
        held = Held(tuple(sorted(nodes))) if nodes else NOWHERE
        if held == self._placed.held(key):
            self._held.pop(key, None)
        else:
            self._held[key] = held

    def check(self) -> None:
        """Asserts that caches fit, and that what is said of keys is what caches hold."""
        room = self._placed.placement.room
        for node, cache in enumerate(self._cached):
            used = sum(self._placed.bytes_of(node).values()) + sum(cache.values())
            assert used + self._free[node] == room.node_bytes, f"node {node}: {used} used, {self._free[node]} free"
            assert self._free[node] >= 0, f"node {node} holds more than it has room for: {-self._free[node]} bytes"
            assert all(node in self.held(key).nodes for key in cache), f"node {node} holds a block that nobody knows of"
        copies = sum(len(held.nodes) - len(self._placed.held(key).nodes) for key, held in self._held.items())
        assert copies == sum(map(len, self._cached)), "a block is said to be where it is not"
