"""What a running cluster knows of its nodes, as the same `ClusterView` that a simulation makes.

Nodes report what they hold and how fast they are; a router adds what it has sent and what was answered since. Knows
nothing of how reports travel. Invariant: a view is immutable, a node that is not among the living is down in it, and
what a lost node held is held no more. Safe to use from several threads.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from rcllm.cluster.estimate import count_held, ready_s
from rcllm.cluster.place import make_place
from rcllm.cluster.placement import BoolArray, Placement, Room
from rcllm.cluster.statistics import collect, ragged
from rcllm.cluster.view import (
    NOWHERE,
    ClusterView,
    FloatArray,
    Held,
    NodeState,
    Route,
    RoutedRequest,
    Stratum,
)
from rcllm.core.ranking import ItemId

_USERS = 100_000  # whose node is remembered
_STATE = NodeState("")
_NEAR = 1.5  # times a rate: nodes that differ by less are of one kind


@dataclass(frozen=True, slots=True)
class NodeReport:
    """One node as it sees itself."""

    node: int
    life: str  # names the process: another one on the same node holds nothing of what this one held
    number: int  # later reports of one life have larger ones
    queue_s: float = 0.0  # of work that runs or waits there
    tokens_per_s: float = _STATE.tokens_per_s
    read_bytes_per_s: float = _STATE.read_bytes_per_s
    fetch_bytes_per_s: float = _STATE.fetch_bytes_per_s
    holds: bytes | None = None  # a bit for each item of the placement, as numpy packs them; None: as before


def packed(items: Collection[int], num_items: int) -> bytes:
    """Numbers of items as a report has them."""
    bits = np.zeros(num_items, dtype=np.bool_)
    bits[list(items)] = True
    return np.packbits(bits).tobytes()


def unpacked(holds: bytes, num_items: int) -> BoolArray:
    """[items] whether each is held."""
    bits = np.unpackbits(np.frombuffer(holds, dtype=np.uint8), count=num_items)
    return bits.astype(np.bool_)


class ReportedHoldings:
    """Where items are as nodes reported it, and before a node's first report as it was placed. See `view.Holdings`."""

    def __init__(self, placement: Placement) -> None:
        self.placement = placement  # where items belong; where they are, reports say
        self.numbers: Mapping[Hashable, int] = {each: number for number, each in enumerate(placement.item_ids)}
        self._holds = np.stack(
            [placement.held_by(n) for n in range(placement.room.num_nodes)], axis=1
        )  # [items, nodes]
        self._users: OrderedDict[Hashable, int] = OrderedDict()
        self.asked = np.zeros(len(self.numbers))  # [items] how often each was read

    @property
    def num_nodes(self) -> int:
        return int(self._holds.shape[1])

    @property
    def num_items(self) -> int:
        return len(self.numbers)

    def held(self, key: Hashable) -> Held:
        number = self.numbers.get(key)
        if number is None:
            node = self._users.get(key)
            return NOWHERE if node is None else Held((node,))
        nodes = np.flatnonzero(self._holds[number])
        return Held(tuple(nodes.tolist())) if len(nodes) else NOWHERE

    def bytes_of(self, node: int) -> Mapping[Stratum, int]:
        placed = self.placement.bytes_of(node) if node < self.placement.room.num_nodes else {}
        held = int(self.placement.num_bytes[self._holds[:, node]].sum())
        return {**placed, "cached": max(0, held - sum(placed.values()))}

    # ---- what the cluster tells of ----

    def grow(self, num_nodes: int) -> None:
        """There are as many nodes now, of which the new ones hold nothing."""
        more = num_nodes - self.num_nodes
        if more > 0:
            self._holds = np.pad(self._holds, ((0, 0), (0, more)))

    def place(self, placement: Placement) -> None:
        """Items belong elsewhere from now on."""
        assert placement.item_ids == self.placement.item_ids, "items have other numbers"
        self.placement = placement

    def report(self, node: int, holds: bytes) -> None:
        self._holds[:, node] = unpacked(holds, self.num_items)

    def served(self, node: int, keys: Collection[Hashable]) -> None:
        """A node has used these blocks, and has them until its next report says otherwise."""
        for key in keys:
            number = self.numbers.get(key)
            if number is not None:
                self._holds[number, node] = True
                self.asked[number] += 1.0
            else:
                self._users[key] = node
                self._users.move_to_end(key)
        while len(self._users) > _USERS:
            self._users.popitem(last=False)

    def outdate(self, keys: Collection[Hashable]) -> None:
        """Nobody holds these any more."""
        for key in keys:
            self._users.pop(key, None)
            if (number := self.numbers.get(key)) is not None:
                self._holds[number] = False

    def lose(self, node: int) -> None:
        """A node holds nothing any more."""
        self._holds[:, node] = False
        self._users = OrderedDict((user, at) for user, at in self._users.items() if at != node)


@dataclass(slots=True)
class _Node:
    """One node, as it was last heard of."""

    report: NodeReport
    up: bool = False
    sent: dict[int, float] = field(default_factory=dict)  # estimated seconds of what is under way there
    free_s: float = 0.0  # when that is done, by estimate
    held_number: int = -1  # of the last report that said what it holds
    reported_s: float = -1.0  # until when the queue that it reported lasts; below what was sent since, it is old


class LiveCluster:
    """Nodes, their load and what they hold, for one router. `clock`: seconds."""

    def __init__(self, placement: Placement, route: Route, full_queue_s: float, clock: Callable[[], float]) -> None:
        self.holdings = ReportedHoldings(placement)
        self._route, self._full_queue_s, self._clock = route, full_queue_s, clock
        self._nodes = [_Node(NodeReport(node, "", -1)) for node in range(placement.room.num_nodes)]
        self._lock = threading.Lock()

    @property
    def num_nodes(self) -> int:
        return len(self._nodes)

    @property
    def up(self) -> tuple[int, ...]:
        """The nodes that live."""
        with self._lock:
            return tuple(number for number, node in enumerate(self._nodes) if node.up)

    @property
    def placement(self) -> Placement:
        """Where items belong."""
        return self.holdings.placement

    def place(self, placement: Placement) -> None:
        """Items belong elsewhere from now on."""
        with self._lock:
            self.holdings.place(placement)

    def heat(self) -> FloatArray:
        """[items] how often each was read, and a little more, so that all differ from nothing."""
        with self._lock:
            return self.holdings.asked + 1.0

    def view(self) -> ClusterView:
        """The cluster as it is now."""
        with self._lock:
            return self._view()

    def choose(self, living: Collection[int], request: RoutedRequest) -> list[int]:
        """The living nodes, the one first that the policy chooses. Raises CapacityError where none lives."""
        with self._lock:
            self._set_living(living)
            decision = self._route(self._view(), request)
        order = np.argsort(-decision.scores, kind="stable").tolist()
        return [decision.node, *(node for node in order if node != decision.node and node in living)]

    def holders(self, request: RoutedRequest, most: int = 4) -> tuple[int, ...]:
        """The living nodes that hold most of a request's items, at most so many: whom to ask for what is missing."""
        with self._lock:
            view = self._view()
            hits = count_held(view, (*request.items, *request.history))
        order = np.argsort(-hits, kind="stable").tolist()
        return tuple(node for node in order if view.up[node] and hits[node] > 0)[:most]

    def heard(self, report: NodeReport) -> None:
        """A node has told of itself. What is older than what is known is passed over."""
        with self._lock:
            self._grow(report.node + 1)
            node = self._nodes[report.node]
            if report.life != node.report.life:
                if node.report.life:
                    self._lose(report.node)
                node.held_number = -1
            elif report.number <= node.report.number:
                self._note_holds(node, report)
                return
            node.report = report
            node.reported_s = self._clock() + report.queue_s
            self._note_holds(node, report)

    def sent(self, node: int, number: int, request: RoutedRequest) -> None:
        """A request is under way to a node."""
        with self._lock:
            self._grow(node + 1)
            seconds = float(ready_s(self._view(), request)[node])
            at, now = self._nodes[node], self._clock()
            at.sent[number] = seconds
            at.free_s = max(now, at.free_s) + seconds

    def ended(self, node: int, number: int, request: RoutedRequest | None) -> None:
        """A request is no longer under way; `request`: it was answered, so that what it read is there."""
        with self._lock:
            at, now = self._nodes[node], self._clock()
            at.sent.pop(number, None)
            at.free_s = now + sum(at.sent.values())
            at.reported_s = min(at.reported_s, at.free_s)
            if request is not None:
                self.holdings.served(node, [block.key for block in (*request.items, *request.history)])

    def lost(self, node: int) -> None:
        """A node has died, with all that it held."""
        with self._lock:
            self._nodes[node].up = False
            self._lose(node)

    def outdate(self, keys: Collection[Hashable]) -> None:
        """Items whose text has changed, or users who were erased."""
        with self._lock:
            self.holdings.outdate(keys)

    # ---- under the lock ----

    def _note_holds(self, node: _Node, report: NodeReport) -> None:
        """Reports with what a node holds take another way than those that come with answers, and a longer one."""
        if report.holds is not None and report.number > node.held_number:
            node.held_number = report.number
            self.holdings.report(report.node, report.holds)

    def _set_living(self, living: Collection[int]) -> None:
        self._grow(max(living, default=-1) + 1)
        for number, node in enumerate(self._nodes):
            if node.up and number not in living:
                self._lose(number)
            node.up = number in living

    def _grow(self, num_nodes: int) -> None:
        self._nodes += [_Node(NodeReport(number, "", -1)) for number in range(len(self._nodes), num_nodes)]
        self.holdings.grow(num_nodes)

    def _lose(self, number: int) -> None:
        node = self._nodes[number]
        node.sent.clear()
        node.free_s = node.reported_s = 0.0
        node.report = replace(node.report, queue_s=0.0)
        self.holdings.lose(number)

    def _view(self) -> ClusterView:
        view = ClusterView.of([self._state(node) for node in self._nodes], self.holdings)
        rates = np.stack((view.tokens_per_s, view.read_bytes_per_s, view.fetch_bytes_per_s))
        tokens, reads, fetches = _alike(rates, view.up)
        return replace(view, tokens_per_s=tokens, read_bytes_per_s=reads, fetch_bytes_per_s=fetches)

    def _state(self, node: _Node) -> NodeState:
        queue_s = max(0.0, max(node.free_s, node.reported_s) - self._clock(), _least(node.sent))
        report = node.report
        return NodeState(
            f"node {report.node}",
            queue_s,
            min(queue_s / self._full_queue_s, 1.0),
            node.up,
            report.read_bytes_per_s,
            report.fetch_bytes_per_s,
            report.tokens_per_s,
        )


def _alike(rates: FloatArray, up: BoolArray) -> FloatArray:
    """[rates, nodes]: nodes whose rates are near the median of the living have that rate.

    Rates are measured under way, and those of two equal nodes differ by a fifth from one moment to the next. The one
    that seems quicker would draw every request that finds all idle, and at last hold alone what is asked for.
    """
    if not up.any():
        return rates
    middle = np.median(rates[:, up], axis=1, keepdims=True)
    return np.where((rates < middle * _NEAR) & (middle < rates * _NEAR), middle, rates)


def _least(sent: Mapping[int, float]) -> float:
    """Of what is under way, all but the one that runs still has to be computed."""
    return sum(sent.values()) - max(sent.values(), default=0.0)


def dealt(item_ids: Sequence[ItemId], num_nodes: int) -> Placement:
    """Every item on the node that the hash of its id says: for clusters for which no placement was built.

    Items count for one byte each, and every node has room for all.
    """
    room = Room(num_nodes, max(len(item_ids), 1))
    if not item_ids:
        none = np.empty(0, np.int64)
        return Placement((), none, room, none > 0, none > 0, none, (none,) * num_nodes, "hash")
    return make_place("hash")(collect(ragged([]), item_ids, [1] * len(item_ids)), room)
