"""What a simulated cluster is, whatever it is asked, and how its router sees it and a request.

Knows nothing of time. Invariant: a router is told of a request what the pass then has: the same bytes and tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from rcllm.cluster.view import ClusterView, Holdings, NodeState, RoutedBlock, RoutedRequest
from rcllm.model.spec import ModelSpec
from rcllm.sim.cost import Costs
from rcllm.sim.demand import Reuse
from rcllm.sim.holdings import user_key
from rcllm.sim.workload import SimRequest

_NEVER = 1.0  # bytes a second: a router that is told so counts on no fetch


@dataclass(frozen=True, slots=True)
class Failure:
    """A node that dies, and comes back with empty memory."""

    node: int
    at_s: float
    back_s: float = float("inf")


@dataclass(frozen=True, slots=True)
class ClusterSpec:
    """What the cluster is, whatever it is asked."""

    num_nodes: int
    costs: Costs
    model: ModelSpec
    kv_bytes_per_token: int
    reuse: Reuse
    cache_bytes: int = 0  # memory of a node beyond what is placed: for copies of its own accord, and histories
    pass_rows: int = 1  # most rows of prompts that share a pass; one request at least
    fetches: bool = True  # missing blocks may come from other nodes, where that is estimated to be sooner
    full_queue_s: float = 1.0  # the queue that counts as load 1
    view_s: float = 0.0  # the router hears of queues this often; 0: always
    host_bytes_per_s: float = 25e9
    fetch_bytes_per_s: float = 12.5e9
    reload_bytes_per_s: float = 2e9  # at which a node that comes back reads what is placed on it
    slow: tuple[tuple[int, float], ...] = ()  # nodes and how many times longer their passes take
    ingress_s: float = 0.0  # on the first machine, before a request is routed: HTTP, tokenising, the way
    egress_s: float = 0.0  # on the node's machine, until its answer is told
    per_machine: int = 1  # nodes that share a machine
    cores: float = math.inf  # of a machine: tasks that run there at once, each on one
    crowding: float = 0.0  # by how much each pass slows down what else runs on its machine


def first_view(spec: ClusterSpec, holdings: Holdings) -> ClusterView:
    """All nodes, idle and up."""
    rate = 1 / spec.costs.rows_s(1)
    states = [
        NodeState(
            f"node-{number}",
            read_bytes_per_s=spec.host_bytes_per_s,
            fetch_bytes_per_s=spec.fetch_bytes_per_s if spec.fetches else _NEVER,
            tokens_per_s=rate,
        )
        for number in range(spec.num_nodes)
    ]
    return ClusterView.of(states, holdings)


def routed(spec: ClusterSpec, request: SimRequest) -> RoutedRequest:
    """A request as the router sees it."""
    reuse, per_token, tokens = spec.reuse, spec.kv_bytes_per_token, request.tokens
    items = tuple(
        RoutedBlock(item, size * per_token, reuse.saved_tokens(size))
        for item, size in zip(request.items, tokens.items, strict=True)
    )
    history: tuple[RoutedBlock, ...] = ()
    if not reuse.semantic_history and tokens.history:
        history = (RoutedBlock(user_key(request.user), tokens.history * per_token, tokens.history),)
    return RoutedRequest(request.number, items, history, tokens.fresh)
