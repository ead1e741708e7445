"""What a placement is worth on requests that it has not seen.

Knows nothing of policies. Invariant: every figure is a pure function of placement, statistics and requests. A request
is routed to the node that holds most of its items; of equal ones, to the one that has been given least so far.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from rcllm.cluster.halo import Table, follow_load
from rcllm.cluster.placement import Placement
from rcllm.cluster.statistics import FloatArray, IntArray, Requests, Statistics, incidence
from rcllm.cluster.view import Stratum

_STEPS = 40  # by which prices follow the load of past requests
_SAME = 1e-4


@dataclass(frozen=True, slots=True)
class Balance:
    """The fullest node over the mean."""

    num_bytes: float  # of what nodes own
    heat: float  # of what nodes own
    requests: float  # that are routed to the best node
    spread: float  # that are routed with load in mind


@dataclass(frozen=True, slots=True)
class Report:
    """Shares are of the items of a request, and means over requests."""

    num_requests: int
    best: float  # on the node that holds most of them
    best_p10: float  # of nine requests in ten, the best node has more
    spread: float  # on the node that is chosen with load in mind: a price for each node, learnt from past requests
    owned: float  # on the node that owns most of them, without copies
    edge_cut: float  # share of the weight between items with owners that lies between two nodes
    balance: Balance
    bytes_by_stratum: tuple[Mapping[Stratum, int], ...]  # by node


def evaluate(placement: Placement, statistics: Statistics, requests: Requests) -> Report:
    """`requests` name items by their numbers in the placement, each at least one."""
    held, sizes = held_table(placement), np.diff(requests.starts)
    hits = incidence(requests, placement.num_items).astype(np.float32) @ held
    past = incidence(statistics.sample, placement.num_items).astype(np.float32) @ held
    prices = np.zeros(held.shape[1], dtype=np.float32)
    if len(past):
        prices = follow_load(past, prices, _STEPS)
    best, spread = routed(hits), routed(hits - prices)
    at = np.arange(len(requests))
    shares = hits[at, best] / sizes
    return Report(
        num_requests=len(requests),
        best=float(shares.mean()),
        best_p10=float(np.quantile(shares, 0.1)),
        spread=float((hits[at, spread] / sizes).mean()),
        owned=float(shares_on_best(held_table(placement, halos=False), requests).mean()),
        edge_cut=edge_cut(placement, statistics),
        balance=_balance(placement, statistics, best, spread),
        bytes_by_stratum=tuple(placement.bytes_of(node) for node in range(placement.room.num_nodes)),
    )


def shares_on_best(held: Table, requests: Requests) -> FloatArray:
    """[requests] share of each one's items on the node that has most of them. held: as `held_table` makes it."""
    hits = incidence(requests, len(held)).astype(np.float32) @ held
    return np.asarray(hits.max(axis=1) / np.diff(requests.starts), dtype=np.float64)


def held_table(placement: Placement, *, halos: bool = True) -> Table:
    """[items, nodes] 1 where a node holds an item."""
    table = np.zeros((placement.num_items, placement.room.num_nodes), dtype=np.float32)
    sharded = np.flatnonzero(placement.sharded)
    table[sharded, placement.owner[sharded]] = 1.0
    table[placement.replicated] = 1.0
    for node, halo in enumerate(placement.halos if halos else ()):
        table[halo, node] = 1.0
    return table


def routed(scores: npt.NDArray[np.float32]) -> IntArray:
    """[requests] the node with the largest score; of equal ones the one that was given least before."""
    best = scores.max(axis=1, keepdims=True) - _SAME
    given = np.zeros(scores.shape[1], dtype=np.int64)
    nodes = np.empty(len(scores), dtype=np.int64)
    for place, tied in enumerate(scores >= best):
        candidates = np.flatnonzero(tied)
        nodes[place] = candidates[given[candidates].argmin()] if len(candidates) > 1 else candidates[0]
        given[nodes[place]] += 1
    return nodes


def edge_cut(placement: Placement, statistics: Statistics) -> float:
    """Share of the weight of edges between sharded items whose ends have different owners; 0 where there is none."""
    edges = statistics.near.tocoo()
    sharded = placement.sharded
    inside = sharded[edges.row] & sharded[edges.col]
    apart = inside & (placement.owner[edges.row] != placement.owner[edges.col])
    total = float(edges.data[inside].sum())
    return float(edges.data[apart].sum()) / total if total else 0.0


def _balance(placement: Placement, statistics: Statistics, best: IntArray, spread: IntArray) -> Balance:
    sharded, num_nodes = placement.sharded, placement.room.num_nodes
    owner = placement.owner[sharded]

    def fullest(nodes: IntArray, weights: npt.NDArray[np.generic] | None = None) -> float:
        loads: FloatArray = np.bincount(nodes, weights, num_nodes).astype(np.float64)
        return float(loads.max() / loads.mean()) if loads.any() else 1.0

    return Balance(
        num_bytes=fullest(owner, placement.num_bytes[sharded]),
        heat=fullest(owner, statistics.heat[sharded]),
        requests=fullest(best),
        spread=fullest(spread),
    )
