"""From one placement to another: which copies have to move, and how far a bounded number of moves gets.

Knows nothing of networks. A block is served by its old owner until the new one has it, so that a plan is a list of
copies to make, in order; what a copy displaces goes when the copy comes. Invariant: every step leaves a placement that
passes `check`, in which every item that both placements hold is held by some node.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import linear_sum_assignment

from rcllm.cluster.placement import Placement
from rcllm.cluster.statistics import FloatArray, IntArray
from rcllm.core.ranking import ItemId
from rcllm.errors import DataError


@dataclass(frozen=True, slots=True)
class Move:
    """One copy to make."""

    item_id: ItemId
    source: int | None  # a node that holds it; None: it is computed
    target: int
    num_bytes: int
    becomes_owner: bool
    dropped: tuple[ItemId, ...]  # what the target gives up for it


@dataclass(frozen=True, slots=True)
class Plan:
    """Moves in order, the placement after them, and what stays to be done."""

    moves: tuple[Move, ...]
    after: Placement
    num_left: int  # moves that the bound, or a lack of room, left for the next plan

    @property
    def num_bytes(self) -> int:
        return sum(move.num_bytes for move in self.moves)


def matched(old: Placement, new: Placement) -> Placement:
    """`new` with its nodes numbered so that most bytes stay where `old` has them.

    Parts of a graph have no names of their own. Raises DataError where the placements are of different items or nodes.
    """
    _check_alike(old, new)
    num_nodes = old.room.num_nodes
    stays = np.array(
        [
            [new.num_bytes[old.held_by(before) & new.held_by(after)].sum() for after in range(num_nodes)]
            for before in range(num_nodes)
        ]
    )
    named, part = linear_sum_assignment(-stays)
    number = np.empty(num_nodes, dtype=np.int64)
    number[part] = named
    halos = tuple(new.halos[after] for after in np.argsort(number).tolist())
    return replace(new, owner=number[new.owner], halos=halos)


def plan_moves(old: Placement, new: Placement, heat: FloatArray, max_moves: int | None = None) -> Plan:
    """The moves that bring `old` closest to `new`: owners first, then the hottest per byte; at most `max_moves`.

    Pass `matched(old, new)` as `new` where its nodes have no names yet. What is replicated in `new` is made from copies
    on each node, and counts as replicated when all are there.
    """
    _check_alike(old, new)
    state = _State(old, new, heat)
    limit = np.inf if max_moves is None else max_moves
    moves: list[Move] = []
    before = -1
    while before < len(moves) < limit:  # a copy that found no room may find it after others have gone
        before = len(moves)
        for item, node in state.wanted():
            if len(moves) < limit and (move := state.move(item, node)) is not None:
                moves.append(move)
    return Plan(tuple(moves), state.placement(), len(state.wanted()))


class _State:
    """Holdings while a plan is made: [items, nodes] who holds what, and who owns it."""

    def __init__(self, old: Placement, new: Placement, heat: FloatArray) -> None:
        self._old, self._new = old, new
        self._worth = heat / np.maximum(new.num_bytes, 1)
        num_nodes = new.room.num_nodes
        self._held = np.stack([old.held_by(node) for node in range(num_nodes)], axis=1)
        self._goal = np.stack([new.held_by(node) for node in range(num_nodes)], axis=1)
        self._owner = old.owner.copy()
        self._free = new.room.node_bytes - new.num_bytes @ self._held
        self._adopt()

    def _adopt(self) -> None:
        """Ownership goes without a move to a new owner that has the item already."""
        there = self._new.sharded & self._held[np.arange(len(self._owner)), self._new.owner]
        self._owner[there] = self._new.owner[there]

    def wanted(self) -> list[tuple[int, int]]:
        """(item, node) of the copies that are missing: owners first, then by heat per byte."""
        items, nodes = np.nonzero(self._goal & ~self._held)
        owns = self._new.sharded[items] & (self._new.owner[items] == nodes)
        order = np.lexsort((nodes, items, -self._worth[items], ~owns))
        return [(int(items[place]), int(nodes[place])) for place in order]

    def move(self, item: int, node: int) -> Move | None:
        """Makes the copy, where there is room for it after what is no longer wanted there is gone."""
        num_bytes = int(self._new.num_bytes[item])
        dropped = self._droppable(node, num_bytes - int(self._free[node]))
        if dropped is None:
            return None
        for each in dropped.tolist():
            self._held[each, node] = False
            self._free[node] += self._new.num_bytes[each]
        source = self._source(item)
        self._held[item, node] = True
        self._free[node] -= num_bytes
        becomes_owner = bool(self._new.sharded[item] and self._new.owner[item] == node)
        if becomes_owner or source is None:
            self._owner[item] = node
        names = tuple(self._new.item_ids[each] for each in dropped.tolist())
        return Move(self._new.item_ids[item], source, node, num_bytes, becomes_owner, names)

    def _source(self, item: int) -> int | None:
        """A node that holds an item, its owner first."""
        owner = int(self._owner[item])
        holders = np.flatnonzero(self._held[item]).tolist()
        return owner if owner in holders else int(holders[0]) if holders else None

    def _droppable(self, node: int, needed: int) -> IntArray | None:
        """The coldest items that `node` may give up for so many bytes; None where there are too few.

        It may give up what the new placement does not want there, if another node holds it.
        """
        if needed <= 0:
            return np.empty(0, np.int64)
        may = self._held[:, node] & ~self._goal[:, node] & ((self._held.sum(axis=1) > 1) | self._new.evicted)
        items = np.flatnonzero(may)
        items = items[np.argsort(self._worth[items], kind="stable")]
        enough = np.searchsorted(np.cumsum(self._new.num_bytes[items]), needed) + 1
        return items[:enough] if enough <= len(items) else None

    def placement(self) -> Placement:
        """What is held now, in strata."""
        held, num_nodes = self._held, self._new.room.num_nodes
        counts = held.sum(axis=1)
        replicated = (counts == num_nodes) & (self._new.replicated | self._old.replicated) & (num_nodes > 1)
        evicted = counts == 0
        owner = self._owner.copy()
        lost = ~evicted & ~held[np.arange(len(owner)), owner]
        owner[lost] = held[lost].argmax(axis=1)
        sharded = ~(replicated | evicted)
        halos = []
        for node in range(num_nodes):
            copies = np.flatnonzero(held[:, node] & sharded & (owner != node))
            halos.append(copies[np.argsort(-self._worth[copies], kind="stable")])
        return replace(self._new, replicated=replicated, evicted=evicted, owner=owner, halos=tuple(halos))


def _check_alike(old: Placement, new: Placement) -> None:
    for what, one, other in (
        ("items, in one order", old.item_ids, new.item_ids),
        ("numbers of nodes", old.room.num_nodes, new.room.num_nodes),
        ("bytes of items", old.num_bytes.tolist(), new.num_bytes.tolist()),
    ):
        if one != other:
            raise DataError(f"expected two placements with the same {what}; build both from the same catalogue")
    if new.room.node_bytes < old.room.node_bytes:
        raise DataError(
            f"expected nodes with as much memory as now, got {new.room.node_bytes:,} bytes after "
            f"{old.room.node_bytes:,}; build the new placement with that, or take memory away by building anew"
        )


def differing(old: Placement, new: Placement) -> Sequence[tuple[str, int]]:
    """How many items changed, by what changed of them; for people."""
    both = old.sharded & new.sharded
    return (
        ("owner", int((both & (old.owner != new.owner)).sum())),
        ("became replicated", int((new.replicated & ~old.replicated).sum())),
        ("ceased to be replicated", int((old.replicated & ~new.replicated).sum())),
        ("became evicted", int((new.evicted & ~old.evicted).sum())),
        ("ceased to be evicted", int((old.evicted & ~new.evicted).sum())),
    )
