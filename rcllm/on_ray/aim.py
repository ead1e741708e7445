"""Which node an envelope goes to: the policy's choice, any other node than some, or one that is named.

Never imports ray or torch; called in the thread of Ray's router. Invariant: a node that a question was lost at is not
asked the same again while another one lives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rcllm.cluster.live import LiveCluster, NodeReport
from rcllm.cluster.view import RoutedRequest

REPORT = "report"  # under which a replica publishes its `NodeReport`


@dataclass(slots=True)
class ByPolicy:
    """By the policy of `cluster`, on what the nodes published and what was sent since."""

    cluster: LiveCluster
    request: RoutedRequest
    number: int  # of this attempt, by which the cluster counts what is under way
    tried: set[int] = field(default_factory=set)  # nodes that have been asked the same; this attempt adds its own
    wished: int = -1  # where it is to go, but for a node that is full
    node: int = -1  # where it was sent: that node has taken it

    def choose(self, living: Mapping[int, Mapping[str, Any]]) -> Sequence[int]:
        hear(self.cluster, living)
        order = self.cluster.choose(living, self.request)
        order = [node for node in order if node not in self.tried] or order
        self.wished = order[0]
        return order

    def routed(self, node: int) -> None:
        if self.node < 0:
            self.node = node
            self.tried.add(node)
            self.cluster.sent(node, self.number, self.request)


@dataclass(slots=True)
class Named:
    """One node and no other. Where it does not live, whoever gets the envelope says that it was not meant."""

    node: int
    cluster: LiveCluster | None = None

    def choose(self, living: Mapping[int, Mapping[str, Any]]) -> Sequence[int]:
        if self.cluster is not None:
            hear(self.cluster, living)
        return [self.node] if self.node in living else list(living)

    def routed(self, node: int) -> None:
        pass


def hear(cluster: LiveCluster, living: Mapping[int, Mapping[str, Any]]) -> None:
    """What nodes published."""
    for stats in living.values():
        if (report := stats.get(REPORT)) is not None:
            cluster.heard(NodeReport(**report))
