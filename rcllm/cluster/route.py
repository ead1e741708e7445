"""Which node answers a request: the routing policies, by name in `ROUTES`.

Each is a pure function of a `ClusterView` and a request (`view.Route`); what it leaves to chance is drawn by the
request's number. Knows nothing of queues or networks. Invariant: a node that is down is never chosen; of nodes with
equal scores the one wins that holds most of the user's history, then the one with the shortest queue, then the first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from rcllm.cluster.estimate import count_held, ready_s
from rcllm.cluster.statistics import IntArray
from rcllm.cluster.view import ClusterView, Decision, FloatArray, Route, RoutedRequest
from rcllm.data.text import did_you_mean
from rcllm.errors import CapacityError, ConfigError

_SAME = 1e-9  # scores that differ by less are equal


@dataclass(frozen=True, slots=True)
class Affinity:
    """RcLLM's α·hit + β·(1 − load), whose weights it does not disclose (§III-C, eq. of Affinity(R, p))."""

    alpha: float = 1.0
    beta: float = 0.5

    def __call__(self, view: ClusterView, request: RoutedRequest) -> Decision:
        hits = count_held(view, request.items)
        share = hits / max(len(request.items), 1)
        scores = self.alpha * share + self.beta * (1.0 - view.load)
        return decide(view, request, scores, "affinity", "affinity", hits)


@dataclass(frozen=True, slots=True)
class LeastTime:
    """The least estimated time to the first token: queue, then blocks and rows.

    A user's history counts like any other block, so that users stay where theirs is unless that takes longer.
    """

    def __call__(self, view: ClusterView, request: RoutedRequest) -> Decision:
        return decide(view, request, -(view.queue_s + ready_s(view, request)), "ttft", "seconds")


@dataclass(frozen=True, slots=True)
class HitOnly:
    """The node that holds most of the items, whatever its queue."""

    def __call__(self, view: ClusterView, request: RoutedRequest) -> Decision:
        hits = count_held(view, request.items)
        return decide(view, request, hits, "hit_only", "items", hits)


@dataclass(frozen=True, slots=True)
class LoadOnly:
    """The node with the least load, whatever it holds."""

    def __call__(self, view: ClusterView, request: RoutedRequest) -> Decision:
        return decide(view, request, -view.load, "load_only", "load")


@dataclass(frozen=True, slots=True)
class RoundRobin:
    """One node after the other, by the request's number."""

    def __call__(self, view: ClusterView, request: RoutedRequest) -> Decision:
        up = np.flatnonzero(view.up)
        return _decide_among(view, request, up[request.number % max(len(up), 1) :][:1], "round_robin")


@dataclass(frozen=True, slots=True)
class PowerOfTwo:
    """The shorter queue of two nodes that are drawn (Mitzenmacher 2001)."""

    seed: int = 0

    def __call__(self, view: ClusterView, request: RoutedRequest) -> Decision:
        up = np.flatnonzero(view.up)
        draw = np.random.default_rng([self.seed, request.number])
        two = draw.choice(up, size=min(2, len(up)), replace=False)
        return _decide_among(view, request, two, "power_of_two")


ROUTES: dict[str, Callable[..., Route]] = {
    "affinity": Affinity,
    "ttft": LeastTime,
    "hit_only": HitOnly,
    "load_only": LoadOnly,
    "round_robin": RoundRobin,
    "power_of_two": PowerOfTwo,
}


def make_route(name: str, **parameters: float) -> Route:
    """The policy of that name. Raises ConfigError."""
    if name not in ROUTES:
        raise ConfigError(f"expected a routing policy ({', '.join(ROUTES)}), got {name!r}.{did_you_mean(name, ROUTES)}")
    return ROUTES[name](**parameters)


def decide(
    view: ClusterView,
    request: RoutedRequest,
    scores: FloatArray,
    policy: str,
    unit: str,
    hits: FloatArray | None = None,
) -> Decision:
    """The node with the largest score of those that are up. Raises CapacityError where none is."""
    if not view.up.any():
        raise CapacityError(f"none of {view.num_nodes} nodes is up; start one, or wait until one is back")
    scores = np.where(view.up, scores, -np.inf)
    best = scores.max()
    tied = np.flatnonzero(scores >= best - _SAME)
    if len(tied) > 1:
        history = count_held(view, request.history)[tied]
        turn = (tied - request.number) % view.num_nodes  # nodes that nothing tells apart take turns
        tied = tied[np.lexsort((turn, view.queue_s[tied], -history))]
    if hits is None:
        hits = count_held(view, request.items)
    return Decision(int(tied[0]), policy, hits, scores, unit, len(request.items), view.names, view.up)


def _decide_among(view: ClusterView, request: RoutedRequest, nodes: IntArray, policy: str) -> Decision:
    """The shortest queue of some nodes; the others are out of the question."""
    scores = np.full(view.num_nodes, -np.inf)
    scores[nodes] = -view.queue_s[nodes]
    return decide(view, request, scores, policy, "seconds of queue")
