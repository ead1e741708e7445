"""Which node holds which items: the noun, and the contract of whoever makes one.

Knows nothing of how a placement is found. Invariant (`check`): every item is in one stratum; a sharded item has one
owner; a halo names items of other owners, each once; no node holds more bytes than it has room for.

    replicated │ on every node     sharded │ on its owner, and on nodes whose halo has it     evicted │ on none
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from rcllm.cluster.statistics import IntArray, Statistics
from rcllm.cluster.view import EVERYWHERE, NOWHERE, Held, Stratum
from rcllm.core.ranking import ItemId

BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Room:
    """The memory that is there for items: as much on every node."""

    num_nodes: int
    node_bytes: int


@dataclass(frozen=True, slots=True)
class Placement:
    """Where every item is. Items and nodes are numbers; arrays are [items]."""

    item_ids: tuple[ItemId, ...]
    num_bytes: IntArray
    room: Room
    replicated: BoolArray
    evicted: BoolArray
    owner: IntArray  # the node that a sharded item belongs to; it says nothing of the others
    halos: tuple[IntArray, ...]  # by node: items of other owners of which it holds copies, most wanted first
    policy: str = ""  # that made it

    @property
    def num_items(self) -> int:
        return len(self.item_ids)

    @property
    def sharded(self) -> BoolArray:
        return ~(self.replicated | self.evicted)

    def owned(self, node: int) -> IntArray:
        """The items that a node owns, ascending."""
        return np.flatnonzero(self.sharded & (self.owner == node))

    def held_by(self, node: int) -> BoolArray:
        """[items] what a node holds, of whatever stratum."""
        held: BoolArray = self.replicated | (self.sharded & (self.owner == node))
        held[self.halos[node]] = True
        return held

    def bytes_of(self, node: int) -> dict[Stratum, int]:
        """What a node holds, by stratum."""
        return {
            "replicated": int(self.num_bytes[self.replicated].sum()),
            "sharded": int(self.num_bytes[self.owned(node)].sum()),
            "halo": int(self.num_bytes[self.halos[node]].sum()),
        }

    def check(self) -> None:
        """Asserts what the head of this module promises."""
        assert not (self.replicated & self.evicted).any(), "an item is everywhere and nowhere"
        owners = self.owner[self.sharded]
        assert not len(owners) or (owners.min() >= 0 and owners.max() < self.room.num_nodes), "an owner is no node"
        assert len(self.halos) == self.room.num_nodes, f"{len(self.halos)} halos of {self.room.num_nodes} nodes"
        for node, halo in enumerate(self.halos):
            assert len(np.unique(halo)) == len(halo), f"the halo of node {node} names an item twice"
            assert self.sharded[halo].all(), f"the halo of node {node} names an item that is not sharded"
            assert (self.owner[halo] != node).all(), f"the halo of node {node} names an item of its own"
            used = self.bytes_of(node)
            assert sum(used.values()) <= self.room.node_bytes, f"node {node}: {used} of {self.room.node_bytes} bytes"


class Place(Protocol):
    """A placement policy: a pure function of statistics and room. Raises CapacityError where nothing fits."""

    def __call__(self, statistics: Statistics, room: Room) -> Placement: ...


@dataclass(frozen=True, slots=True)
class PlacedHoldings:
    """A placement as a router sees it: holdings that never change. See `view.Holdings`."""

    placement: Placement
    by_key: Mapping[Hashable, Held] = field(repr=False)

    @classmethod
    def of(cls, placement: Placement, keys: Sequence[Hashable] | None = None) -> PlacedHoldings:
        """`keys`: of the items in their order, such as their content keys; None: the item ids themselves."""
        copies: list[list[int]] = [[] for _ in placement.item_ids]
        for item in np.flatnonzero(placement.sharded).tolist():
            copies[item].append(int(placement.owner[item]))
        for node, halo in enumerate(placement.halos):
            for item in halo.tolist():
                copies[item].append(node)
        names: Sequence[Hashable] = placement.item_ids if keys is None else keys
        held = {key: Held(tuple(sorted(nodes))) for key, nodes in zip(names, copies, strict=True) if nodes}
        held |= {names[item]: EVERYWHERE for item in np.flatnonzero(placement.replicated).tolist()}
        return cls(placement, held)

    def held(self, key: Hashable) -> Held:
        return self.by_key.get(key, NOWHERE)

    def bytes_of(self, node: int) -> Mapping[Stratum, int]:
        return self.placement.bytes_of(node)
