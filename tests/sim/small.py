"""A world whose times can be computed by hand: a pass takes 1 s and 0.01 s for each row."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from rcllm.cluster.view import ClusterView, Decision, FixedHoldings, Held, Route, RoutedRequest
from rcllm.core.requests import Level
from rcllm.errors import CapacityError
from rcllm.model.spec import ModelSpec
from rcllm.sim.cost import Fitted, Network
from rcllm.sim.demand import Reuse, Tokens
from rcllm.sim.hardware import find_model
from rcllm.sim.spec import ClusterSpec
from rcllm.sim.workload import SimRequest

MODEL: ModelSpec = find_model("smollm2-135m")
KV_BYTES = MODEL.kv_bytes_per_token(2)
FRESH, ITEM = 10, 100  # tokens: labels and question; an item
PASS_S = 1.0 + 0.01 * FRESH  # of a request whose items are all there


def costs(fetch_s: float = 0.2) -> Fitted:
    return Fitted(1.0, 0.01, 0.0, 0.0, 0.0, 0.0, 0, Network(float("inf"), fetch_s))


def spec(num_nodes: int = 1, *, level: str = "blocks", fetch_s: float = 0.2, **changed: object) -> ClusterSpec:
    settings: dict[str, object] = {"cache_bytes": 100 * ITEM * KV_BYTES, "pass_rows": 1, **changed}
    reuse = Reuse(Level.parse(level), semantic_history=True)
    return ClusterSpec(num_nodes, costs(fetch_s), MODEL, KV_BYTES, reuse, **settings)  # type: ignore[arg-type]


def request(number: int, arrival_s: float, items: Sequence[int] = (0,), user: int = 0) -> SimRequest:
    tokens = Tokens(0, 0, (ITEM,) * len(items), FRESH)
    return SimRequest(number, arrival_s, user, tuple(items), tokens)


def placed(*items_of_nodes: Iterable[int]) -> FixedHoldings:
    """Which items each node holds."""
    nodes: dict[int, list[int]] = {}
    for node, items in enumerate(items_of_nodes):
        for item in items:
            nodes.setdefault(item, []).append(node)
    return FixedHoldings({item: Held(tuple(held)) for item, held in nodes.items()})


def prefer(*order: int) -> Route:
    """Always the first of these nodes that is up."""

    def route(view: ClusterView, asked: RoutedRequest) -> Decision:
        scores = np.full(view.num_nodes, -np.inf)
        for rank, node in enumerate(order):
            if view.up[node]:
                scores[node] = -rank
        return _decision(view, asked, scores)

    return route


def shortest_queue(view: ClusterView, asked: RoutedRequest) -> Decision:
    return _decision(view, asked, np.where(view.up, -view.queue_s, -np.inf))


def _decision(view: ClusterView, asked: RoutedRequest, scores: np.ndarray) -> Decision:
    if not np.isfinite(scores).any():
        raise CapacityError("no node is up")
    held = [view.holdings.held(block.key) for block in asked.items]
    nodes = range(view.num_nodes)
    hits = np.array([sum(each.everywhere or node in each.nodes for each in held) for node in nodes], dtype=float)
    return Decision(int(scores.argmax()), "test", hits, scores, "", len(asked.items), view.names, view.up)
