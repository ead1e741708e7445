"""What a router sees: the nodes with their load and rates, where KV blocks are, and one request; and what it decides.

Knows nothing of policies, clocks or networks. Nodes are numbers into `ClusterView.names`; a number keeps its node for
as long as the cluster lives, and a node that is down stays in its place. Invariant: nothing here changes while a policy
looks at it; who keeps holdings that change makes decisions one after another.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]
Key = Hashable  # of a KV block: a content key in a live cluster, an item or its number in a simulation
# On every node; of its owner; copies that were planned; copies that a node keeps of its own accord.
Stratum = Literal["replicated", "sharded", "halo", "cached"]


# ---- where KV blocks are --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Held:
    """The nodes that hold one KV block."""

    nodes: tuple[int, ...] = ()  # ascending; empty where it is everywhere
    everywhere: bool = False
    read_s: tuple[float, ...] = ()  # for each of `nodes`, as its own lookup estimates; empty: by the node's rate


NOWHERE = Held()
EVERYWHERE = Held(everywhere=True)


class Holdings(Protocol):
    """Where every KV block of the cluster is. Reading changes nothing, and raises for no key."""

    def held(self, key: Key) -> Held:
        """`NOWHERE` for a block that no node has."""

    def bytes_of(self, node: int) -> Mapping[Stratum, int]:
        """What a node holds, by stratum."""


@dataclass(frozen=True, slots=True)
class FixedHoldings:
    """Holdings that are given key by key: for tests, and for clusters of which little is known."""

    by_key: Mapping[Key, Held] = field(default_factory=dict)
    by_node: Mapping[int, Mapping[Stratum, int]] = field(default_factory=dict)  # bytes

    def held(self, key: Key) -> Held:
        return self.by_key.get(key, NOWHERE)

    def bytes_of(self, node: int) -> Mapping[Stratum, int]:
        return self.by_node.get(node, {})


# ---- nodes ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class NodeState:
    """One node as it was last heard of."""

    name: str
    queue_s: float = 0.0  # seconds of work that runs or waits there
    load: float = 0.0  # 0 … 1: use of the processor, or its queue over the longest that is allowed
    up: bool = True
    read_bytes_per_s: float = 25e9  # KV from its own memory to where it computes
    fetch_bytes_per_s: float = 12.5e9  # KV from another node
    tokens_per_s: float = 10e3  # computed afresh


@dataclass(frozen=True, slots=True)
class ClusterView:
    """All nodes at one moment, as columns: a policy asks the same of each. Arrays are [nodes]."""

    names: tuple[str, ...]
    queue_s: FloatArray
    load: FloatArray
    up: BoolArray
    read_bytes_per_s: FloatArray
    fetch_bytes_per_s: FloatArray
    tokens_per_s: FloatArray
    holdings: Holdings = FixedHoldings()

    @classmethod
    def of(cls, nodes: Sequence[NodeState], holdings: Holdings) -> ClusterView:
        """From one row per node."""
        assert nodes, "a cluster has a node"

        def column(name: str) -> FloatArray:
            return np.array([getattr(node, name) for node in nodes], dtype=np.float64)

        return cls(
            tuple(node.name for node in nodes),
            column("queue_s"),
            column("load"),
            np.array([node.up for node in nodes], dtype=np.bool_),
            column("read_bytes_per_s"),
            column("fetch_bytes_per_s"),
            column("tokens_per_s"),
            holdings,
        )

    @property
    def num_nodes(self) -> int:
        return len(self.names)

    def at(self, queue_s: FloatArray, load: FloatArray) -> ClusterView:
        """The same cluster, later."""
        return replace(self, queue_s=queue_s, load=load)


# ---- requests and decisions -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RoutedBlock:
    """A KV block that a request reads."""

    key: Key
    num_bytes: int
    num_tokens: int  # computed where the block is missing


@dataclass(frozen=True, slots=True)
class RoutedRequest:
    """What a router needs to know of a request."""

    number: int  # its place in the order of arrival; draws what a policy leaves to chance
    items: tuple[RoutedBlock, ...]  # candidates; locality is told of these alone
    history: tuple[RoutedBlock, ...] = ()  # of the user; nodes that served the user before may hold them
    rows: int = 0  # tokens that are computed on whatever node: labels, delimiters, question


@dataclass(frozen=True, slots=True)
class Decision:
    """The node that answers, and what spoke for each. Arrays are [nodes]."""

    node: int
    policy: str
    hits: FloatArray  # items of the request that each node holds
    scores: FloatArray  # by which the policy chose: the largest wins, and −inf is out of the question
    unit: str  # of the scores, for people
    num_items: int
    names: tuple[str, ...]
    up: BoolArray

    @property
    def achieved(self) -> float:
        """Share of the request's items that the chosen node holds; 1 where it has none."""
        return float(self.hits[self.node]) / self.num_items if self.num_items else 1.0

    @property
    def reachable(self) -> float:
        """The same share on the node that holds most of them, of those that are up."""
        return float(self.hits[self.up].max()) / self.num_items if self.num_items else 1.0

    def explain(self, num_rows: int = 5) -> str:
        """Why this node, beside the ones that came next."""
        order = np.argsort(-self.scores, kind="stable")
        others = [int(node) for node in order if node != self.node and np.isfinite(self.scores[node])]
        lines = [
            f"{self.policy} chose {self.names[self.node]}, which holds {self.hits[self.node]:.0f} of {self.num_items} "
            f"items; {self.reachable:.0%} could be reached, {self.achieved:.0%} are"
        ]
        for node in [self.node, *others[: num_rows - 1]]:
            mark = "→" if node == self.node else " "
            lines.append(
                f"{mark} {self.names[node]}: {self.hits[node]:.0f} items, {self.unit} {abs(self.scores[node]):.4g}"
            )
        if len(others) > num_rows - 1:
            lines.append(f"  and {len(others) - num_rows + 1} more nodes")
        return "\n".join(lines)


class Route(Protocol):
    """A routing policy: a pure function, equal for equal arguments. Raises CapacityError where no node is up."""

    def __call__(self, view: ClusterView, request: RoutedRequest) -> Decision: ...
