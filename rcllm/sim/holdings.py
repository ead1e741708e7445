"""Where KV blocks are in the simulated cluster: what was placed, what nodes cached since, and what they lost.

Knows nothing of times or routing. Keys are items (0 and up) and users (−1 and down). Both classes are
`cluster.view.Holdings`. Invariant: only what was touched has an object of its own, so that a catalogue of 10^8 items
costs no memory.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field

import numpy as np

from rcllm.cluster.view import EVERYWHERE, NOWHERE, Held, Holdings, Stratum
from rcllm.sim.options import Workload
from rcllm.sim.workload import zipf_share

_REMEMBERED = 1 << 16
_BITS = (1 << 64) - 1


def user_key(user: int) -> int:
    return -1 - user


@dataclass(frozen=True, slots=True)
class LazyPlacement:
    """The hottest items on every node, the rest by topic (or hash), found from an item's number when it is asked for.

        0 ── hot ──▶ everywhere │ ── kept ──▶ on its owner │ ──▶ nowhere

    By topic is what a partition of the co-occurrence graph comes to where topics are what joins items: each node has a
    run of neighbouring topics; where there are more nodes than topics, each topic has a run of nodes, which begins and
    ends within a node where the numbers do not divide.
    """

    num_nodes: int
    topics: int  # 0: by hash
    hot: int
    kept: int
    item_bytes: float  # in the mean
    owners: tuple[Held, ...] = field(repr=False)

    @classmethod
    def of(
        cls, workload: Workload, num_nodes: int, node_bytes: float, item_bytes: float, hot: int, *, by_topic: bool
    ) -> LazyPlacement:
        """As many items as fit, the most popular first; what is left of the memory holds more hot items."""
        room = node_bytes / item_bytes  # items of one node
        hot = min(hot, workload.items, int(room))
        kept = min(workload.items, hot + int((room - hot) * num_nodes))
        if kept == workload.items and num_nodes > 1:  # hot + (items − hot) / nodes = room
            spare = int((room * num_nodes - workload.items) / (num_nodes - 1))
            hot = min(workload.items, max(hot, spare))
        owners = tuple(Held((node,)) for node in range(num_nodes))
        return cls(num_nodes, workload.topics if by_topic else 0, hot, kept, item_bytes, owners)

    def held(self, key: Hashable) -> Held:
        assert isinstance(key, int)
        if key < 0 or key >= self.kept:
            return NOWHERE
        return EVERYWHERE if key < self.hot else self.owners[self.owner(key)]

    def owner(self, item: int) -> int:
        if not self.topics:
            return _mixed(item) % self.num_nodes
        topic, place = item % self.topics, item // self.topics
        within = place * self.topics % self.num_nodes if self.num_nodes > self.topics else 0  # the run, in turn
        return (topic * self.num_nodes + within) // self.topics

    def bytes_of(self, node: int) -> Mapping[Stratum, int]:
        shard = (self.kept - self.hot) / self.num_nodes
        return {"replicated": int(self.hot * self.item_bytes), "sharded": int(shard * self.item_bytes)}


def _mixed(item: int) -> int:
    """Well-mixed bits of a number: the finaliser of splitmix64, as in `workload.hashed`."""
    mixed = (item ^ (item >> 30)) * 0xBF58476D1CE4E5B9 & _BITS
    mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB & _BITS
    return mixed ^ (mixed >> 31)


def head_share(workload: Workload, hot: int) -> float:
    """Share of candidates that fall on the `hot` most popular items of the catalogue."""
    return workload.locality * _local_share(workload, hot) + (1 - workload.locality) * _far_share(workload, hot)


def expected_hit_rate(workload: Workload, placed: LazyPlacement) -> float:
    """Share of a request's candidates on the node that owns its topic, by the law that candidates are drawn from."""
    local = _local_share(workload, placed.kept) - _local_share(workload, placed.hot)
    far = _far_share(workload, placed.kept) - _far_share(workload, placed.hot)
    near, nodes = workload.locality, placed.num_nodes
    stays = stay_share(workload, nodes) if placed.topics else 1 / nodes
    return head_share(workload, placed.hot) + near * local * stays + (1 - near) * far / nodes


def stay_share(workload: Workload, num_nodes: int) -> float:
    """Share of a topic's candidates on the node of that topic.

    A node has a run of W = 1 / nodes of the ring, or one of the nodes of a topic, W = 1 / topics. From a place in it,
    uniform, a step with a Laplace law of scale s leaves it with probability (s / W) · (1 − exp(−W / s)).
    """
    part = _largest_part(workload.topics, num_nodes)
    if num_nodes == 1 or not workload.spread:
        return part
    ratio = workload.spread * min(num_nodes, workload.topics)
    return part * (1 - ratio * (1 - math.exp(-1 / ratio)))


def _largest_part(topics: int, num_nodes: int) -> float:
    """Share of a topic on the node that has most of it, in the mean: its run of nodes may begin within one."""
    length = max(num_nodes / topics, 1.0)  # in nodes
    begins = np.arange(topics) * num_nodes % topics / topics if length > 1.0 else np.zeros(1)
    return float(np.minimum(np.maximum(1 - begins, begins + length - 1), 1).mean()) / length


def _local_share(workload: Workload, hot: int) -> float:
    return zipf_share(hot / workload.topics, max(1, workload.items // workload.topics), workload.zipf)


def _far_share(workload: Workload, hot: int) -> float:
    return zipf_share(hot, workload.items, workload.zipf)


class LiveHoldings:
    """A placement and everything that became of it."""

    def __init__(self, placed: Holdings, num_nodes: int) -> None:
        self._placed = placed
        self._copies: dict[int, tuple[int, ...]] = {}  # ascending; on nodes that keep them of their own accord
        self._outdated: dict[int, int] = {}  # items whose placed blocks are of an old text, and how many texts behind
        self._lost: frozenset[int] = frozenset()  # nodes without what was placed on them
        self._asked: dict[int, Held] = {}  # the placement's latest answers: a router asks for a key several times
        self._all = tuple(range(num_nodes))
        self._everywhere = EVERYWHERE  # what is left of it

    def held(self, key: Hashable) -> Held:
        assert isinstance(key, int)
        if self._is_whole and key not in self._copies:
            return self.placed_on(key)
        placed = NOWHERE if key in self._outdated else self.placed_on(key)
        if self._lost and placed is not NOWHERE:
            placed = self._everywhere if placed.everywhere else self._left(placed)
        copies = self._copies.get(key)
        if copies is None or placed.everywhere:
            return placed
        return Held(tuple(sorted({*placed.nodes, *copies})) if placed.nodes else copies)

    def holds(self, node: int, key: int) -> bool:
        """Whether a node has a block."""
        held = self.held(key)
        return held.everywhere or node in held.nodes

    def is_placed(self, node: int, key: int) -> bool:
        """Whether a node has a block by placement, not in its cache."""
        if node in self._lost or key in self._outdated:
            return False
        held = self.placed_on(key)
        return held.everywhere or node in held.nodes

    def placed_on(self, key: int) -> Held:
        """Where it belongs, whether or not it is there."""
        held = self._asked.get(key)
        if held is None:
            if len(self._asked) >= _REMEMBERED:
                self._asked.clear()
            held = self._asked[key] = self._placed.held(key)
        return held

    def bytes_of(self, node: int) -> Mapping[Stratum, int]:
        return {} if node in self._lost else self._placed.bytes_of(node)

    def placed_bytes(self, node: int) -> Mapping[Stratum, int]:
        """What belongs on a node, whether or not it is there."""
        return self._placed.bytes_of(node)

    def add_copy(self, node: int, key: int) -> None:
        self._copies[key] = tuple(sorted({*self._copies.get(key, ()), node}))

    def drop_copy(self, node: int, key: int) -> None:
        left = tuple(each for each in self._copies.get(key, ()) if each != node)
        if left:
            self._copies[key] = left
        else:
            self._copies.pop(key, None)

    def copies_of(self, key: int) -> tuple[int, ...]:
        return self._copies.get(key, ())

    @property
    def _is_whole(self) -> bool:
        return not (self._lost or self._outdated)

    def outdate(self, item: int) -> None:
        """The text of an item has changed: no placed block of it is of use."""
        self._outdated[item] = self._outdated.get(item, 0) + 1

    def renew(self, item: int) -> None:
        """Its blocks are one text nearer to what it is now."""
        behind = self._outdated.pop(item, 0) - 1
        if behind > 0:
            self._outdated[item] = behind

    def lose(self, node: int) -> None:
        self._set_lost(self._lost | {node})

    def regain(self, node: int) -> None:
        self._set_lost(self._lost - {node})

    def _set_lost(self, lost: frozenset[int]) -> None:
        self._lost = lost
        self._everywhere = Held(tuple(n for n in self._all if n not in lost)) if lost else EVERYWHERE

    def _left(self, held: Held) -> Held:
        left = tuple(node for node in held.nodes if node not in self._lost)
        return held if len(left) == len(held.nodes) else Held(left) if left else NOWHERE
