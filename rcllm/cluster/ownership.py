"""Who owns an item is a label: of the nodes that hold it, whichever keeps bytes and heat in balance.

So copies come first, where requests want them, and owners are chosen afterwards among those who hold an item; no byte
moves. Knows nothing of requests. Invariant: what each node holds stays as it was.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from rcllm.cluster.placement import BoolArray, Placement
from rcllm.cluster.statistics import FloatArray, IntArray
from rcllm.cluster.strata import IMBALANCE

_PASSES = 20  # over the items of nodes that own too much
_NOTHING = 1e-9  # less is no gain


def relabelled(placement: Placement, heat: FloatArray) -> Placement:
    """The placement with owners chosen for balance. `imbalance` tells how far that went."""
    sharded = np.flatnonzero(placement.sharded)
    num_nodes = placement.room.num_nodes
    held = np.stack([placement.held_by(node)[sharded] for node in range(num_nodes)], axis=1)
    weights = np.stack([placement.num_bytes[sharded].astype(np.float64), heat[sharded]], axis=1)
    shares = weights / np.maximum(weights.sum(axis=0), 1e-12) * num_nodes / (1.0 + IMBALANCE)  # 1 is full
    owner = placement.owner.copy()
    owner[sharded] = _chosen(held, shares, owner[sharded])
    changed = placement.owner != owner
    halos = []
    for node, halo in enumerate(placement.halos):
        given = np.flatnonzero(changed & placement.sharded & (placement.owner == node))
        halos.append(np.concatenate([given[np.argsort(-heat[given], kind="stable")], halo[owner[halo] != node]]))
    return replace(placement, owner=owner, halos=tuple(halos))


def adopted(placement: Placement) -> Placement:
    """The placement with items that had no owner, and that a halo holds, as sharded ones of the first such node."""
    owner, evicted = placement.owner.copy(), placement.evicted.copy()
    halos = []
    for node, halo in enumerate(placement.halos):
        found = halo[evicted[halo]]
        owner[found] = node
        evicted[found] = False
        halos.append(halo[~np.isin(halo, found)])
    return replace(placement, owner=owner, evicted=evicted, halos=tuple(halos))


def imbalance(placement: Placement, heat: FloatArray) -> float:
    """The most that a node owns over the mean, in bytes or in heat, less 1."""
    sharded = placement.sharded
    loads = [
        np.bincount(placement.owner[sharded], weights[sharded], placement.room.num_nodes)
        for weights in (placement.num_bytes, heat)
    ]
    return float(max((load.max() / load.mean() for load in loads if load.any()), default=1.0)) - 1.0


def _chosen(held: BoolArray, shares: FloatArray, owner: IntArray) -> IntArray:
    """[items] an owner among the holders: as it was, but for what balance asks to give away."""
    kept = _relieved(held, shares, owner.copy())
    if _loads(shares, kept, held.shape[1]).max() <= 1.0:
        return kept
    dealt = _relieved(held, shares, _dealt(held, shares))
    return min(kept, dealt, key=lambda each: float(_loads(shares, each, held.shape[1]).max()))


def _dealt(held: BoolArray, shares: FloatArray) -> IntArray:
    """Owners from nothing: the largest items first, each to the holder that has least."""
    loads = np.zeros((held.shape[1], shares.shape[1]))
    owner = np.zeros(len(held), dtype=np.int64)
    order = np.lexsort((-shares.max(axis=1), held.sum(axis=1) > 1))  # who has one holder goes first
    for item in order.tolist():
        holders = np.flatnonzero(held[item])
        owner[item] = holders[(loads[holders] + shares[item]).max(axis=1).argmin()]
        loads[owner[item]] += shares[item]
    return owner


def _loads(shares: FloatArray, owner: IntArray, num_nodes: int) -> FloatArray:
    """[nodes, 2]"""
    loads = np.zeros((num_nodes, shares.shape[1]))
    np.add.at(loads, owner, shares)
    return loads


def _relieved(held: BoolArray, shares: FloatArray, owner: IntArray) -> IntArray:
    """The owners after nodes that own too much gave to holders that own less. Changes `owner`."""
    loads = _loads(shares, owner, held.shape[1])
    shared = held.sum(axis=1) > 1
    for _ in range(_PASSES):
        if not sum(_relieve(held, shares, owner, loads, node, shared) for node in range(len(loads))):
            break
    return owner


def _relieve(
    held: BoolArray, shares: FloatArray, owner: IntArray, loads: FloatArray, node: int, shared: BoolArray
) -> int:
    """Gives items of one node to holders that own less, until it has room; returns how many."""
    given = 0
    items = np.flatnonzero((owner == node) & shared) if loads[node].max() > 1.0 else np.empty(0, np.int64)
    kind = int(loads[node].argmax())
    for item in items[np.argsort(-shares[items, kind], kind="stable")].tolist():
        if loads[node].max() <= 1.0:
            break
        holders = np.flatnonzero(held[item] & (np.arange(len(loads)) != node))
        after = (loads[holders] + shares[item]).max(axis=1)
        if after.min() < loads[node].max() - _NOTHING:
            other = int(holders[after.argmin()])
            owner[item] = other
            loads[node] -= shares[item]
            loads[other] += shares[item]
            given += 1
    return given
