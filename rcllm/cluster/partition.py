"""Divides sharded items among nodes, each to one owner: METIS, and what it is compared with.

Knows nothing of copies. Invariant: every sharded item gets an owner, and what a node owns fits its room; `fit` moves
what does not, coldest first, and evicts only what fits nowhere.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from blake3 import blake3

from rcllm.cluster.balance import balanced
from rcllm.cluster.placement import Room
from rcllm.cluster.statistics import FloatArray, IntArray, Statistics
from rcllm.cluster.strata import IMBALANCE, Strata
from rcllm.errors import ConfigError

_SCALE = 1_000_000  # of METIS's whole-numbered weights of items, in all; its numbers have 32 bits


@dataclass(frozen=True, slots=True)
class Division:
    """Strata, and the owner of each item that is sharded; of others it says nothing."""

    strata: Strata
    owner: IntArray  # [items]


Partition = Callable[[Statistics, Strata, Room, int], IntArray]  # with a seed, to the owner of each item


def by_hash(statistics: Statistics, strata: Strata, room: Room, seed: int) -> IntArray:
    """By a hash of the item's id: needs no statistics, and nobody has to be asked where an item is."""
    digests = (blake3(f"{seed} {item_id}".encode()).digest()[:8] for item_id in statistics.item_ids)
    return np.array([int.from_bytes(digest, "big") % room.num_nodes for digest in digests], dtype=np.int64)


def by_chance(statistics: Statistics, strata: Strata, room: Room, seed: int) -> IntArray:
    """Equally many items on each node, drawn."""
    order = np.random.default_rng(seed).permutation(statistics.num_items)
    return _dealt(order, strata, room)


def by_popularity(statistics: Statistics, strata: Strata, room: Room, seed: int) -> IntArray:
    """The hottest to the first node, the next to the second, and so on in turn: heat is balanced."""
    return _dealt(np.argsort(-statistics.heat, kind="stable"), strata, room)


def by_cut(statistics: Statistics, strata: Strata, room: Room, seed: int) -> IntArray:
    """Few requests across parts (METIS; Karypis & Kumar 1998), with bytes in balance and heat as it comes."""
    return _cut(statistics, strata, room, seed, statistics.num_bytes.astype(np.float64))[0]


def by_metis(statistics: Statistics, strata: Strata, room: Room, seed: int) -> IntArray:
    """The same with bytes and heat in balance: METIS balances heat, which is harder to mend than bytes."""
    owner, graph = _cut(statistics, strata, room, seed, statistics.heat)
    members = np.flatnonzero(strata.sharded)
    weights = np.stack([statistics.num_bytes[members].astype(np.float64), statistics.heat[members]])
    owner[members] = balanced(owner[members], weights, graph, room.num_nodes, 1.0 + IMBALANCE)
    return owner


PARTITIONS: dict[str, Partition] = {
    "hash": by_hash,
    "random": by_chance,
    "popularity": by_popularity,
    "cut": by_cut,
    "metis": by_metis,
}


def _dealt(order: IntArray, strata: Strata, room: Room) -> IntArray:
    dealt = order[strata.sharded[order]]
    owner = np.zeros(len(order), dtype=np.int64)
    owner[dealt] = np.arange(len(dealt)) % room.num_nodes
    return owner


def _cut(statistics: Statistics, strata: Strata, room: Room, seed: int, weights: FloatArray) -> tuple[IntArray, Any]:
    """The owner of each item in balance of the weights [items], and the graph of the items that are sharded."""
    members = np.flatnonzero(strata.sharded)
    owner = np.zeros(statistics.num_items, dtype=np.int64)
    graph = statistics.near[members][:, members].tocsr()
    if len(members) <= room.num_nodes:
        owner[members] = np.arange(len(members))
    elif room.num_nodes > 1:
        owner[members] = _metis(graph, weights[members], room.num_nodes, seed)
    return owner, graph


def _metis(graph: Any, weights: FloatArray, num_parts: int, seed: int) -> IntArray:
    """[items] parts by METIS, in balance of the weights."""
    try:
        import pymetis  # noqa: PLC0415  the one place that needs it: an optional dependency
    except ImportError as error:
        raise ConfigError(
            "dividing items by METIS needs pymetis; install it with: pip install 'rcllm[cluster]', or place by hash, "
            "random or popularity"
        ) from error
    edges = np.maximum(np.rint(graph.data * min(1.0, 2**30 / max(float(graph.data.sum()), 1.0))), 1)
    found = pymetis.part_graph(
        num_parts,
        pymetis.CSRAdjacency(graph.indptr.astype(np.int32), graph.indices.astype(np.int32)),
        vweights=np.maximum(np.rint(weights * (_SCALE / max(float(weights.sum()), 1.0))), 1).astype(np.int32),
        eweights=edges.astype(np.int32),
        options=pymetis.Options(ufactor=round(1000 * IMBALANCE), seed=seed),
    )
    return np.asarray(found.vertex_part, dtype=np.int64)


def fit(statistics: Statistics, division: Division, room: Room) -> Division:
    """The division with the coldest items of nodes that are too full on emptier ones, or evicted."""
    num_bytes, heat = statistics.num_bytes, statistics.heat
    owner, evicted = division.owner.copy(), division.strata.evicted.copy()
    sharded = division.strata.sharded
    each = room.node_bytes - int(num_bytes[division.strata.replicated].sum())
    free = each - np.bincount(owner[sharded], num_bytes[sharded], room.num_nodes).astype(np.int64)
    surplus = []
    for node in np.flatnonzero(free < 0).tolist():
        owned = np.flatnonzero(sharded & (owner == node))
        owned = owned[np.argsort(heat[owned], kind="stable")]
        num = int(np.searchsorted(np.cumsum(num_bytes[owned]), -free[node])) + 1
        free[node] += num_bytes[owned[:num]].sum()
        surplus += owned[:num].tolist()
    for item in sorted(surplus, key=lambda item: (-heat[item], item)):
        emptiest = int(free.argmax())
        if free[emptiest] >= num_bytes[item]:
            owner[item] = emptiest
            free[emptiest] -= num_bytes[item]
        else:
            evicted[item] = True
    return Division(replace(division.strata, evicted=evicted), owner)
