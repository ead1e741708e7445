"""Who owns an item is a label: of the nodes that hold it, whichever keeps bytes and heat in balance.

So copies come first, where requests want them, and owners are chosen afterwards among those who hold an item; no byte
moves. Knows nothing of requests. Invariant: what each node holds stays as it was.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from rcllm.cluster.placement import Placement
from rcllm.cluster.statistics import FloatArray, IntArray
from rcllm.cluster.strata import IMBALANCE

_PASSES = 20  # over the items of nodes that own too much


def relabelled(placement: Placement, heat: FloatArray) -> Placement:
    """The placement with owners chosen for balance. `imbalance` tells how far that went."""
    sharded = np.flatnonzero(placement.sharded)
    num_nodes = placement.room.num_nodes
    held = np.stack([placement.held_by(node)[sharded] for node in range(num_nodes)], axis=1)
    weights = np.stack([placement.num_bytes[sharded].astype(np.float64), heat[sharded]], axis=1)
    shares = weights / np.maximum(weights.sum(axis=0), 1e-12) * num_nodes / (1.0 + IMBALANCE)  # 1 is full
    owner = placement.owner.copy()
    owner[sharded] = _chosen(held, shares)
    changed = placement.owner != owner
    halos = []
    for node, halo in enumerate(placement.halos):
        given = np.flatnonzero(changed & placement.sharded & (placement.owner == node))
        halos.append(np.concatenate([given[np.argsort(-heat[given], kind="stable")], halo[owner[halo] != node]]))
    return replace(placement, owner=owner, halos=tuple(halos))


def imbalance(placement: Placement, heat: FloatArray) -> float:
    """The most that a node owns over the mean, in bytes or in heat, less 1."""
    sharded = placement.sharded
    loads = [
        np.bincount(placement.owner[sharded], weights[sharded], placement.room.num_nodes)
        for weights in (placement.num_bytes, heat)
    ]
    return float(max((load.max() / load.mean() for load in loads if load.any()), default=1.0)) - 1.0


def _chosen(held: FloatArray, shares: FloatArray) -> IntArray:
    """[items] an owner among the holders: the largest items first, each to the holder that has least."""
    loads = np.zeros((held.shape[1], shares.shape[1]))
    owner = np.zeros(len(held), dtype=np.int64)
    order = np.lexsort((-shares.max(axis=1), held.sum(axis=1) > 1))  # who has one holder goes first
    for item in order.tolist():
        holders = np.flatnonzero(held[item])
        owner[item] = holders[(loads[holders] + shares[item]).max(axis=1).argmin()]
        loads[owner[item]] += shares[item]
    for _ in range(_PASSES):
        if not _relieve(held, shares, owner, loads):
            break
    return owner


def _relieve(held: FloatArray, shares: FloatArray, owner: IntArray, loads: FloatArray) -> int:
    """Gives items of nodes that own too much to holders that own less; returns how many. Changes owners and loads."""
    given = 0
    for node in np.flatnonzero(loads.max(axis=1) > 1.0).tolist():
        for item in np.flatnonzero((owner == node) & (held.sum(axis=1) > 1)).tolist():
            if loads[node].max() <= 1.0:
                break
            holders = np.flatnonzero(held[item])
            after = (loads[holders] + shares[item]).max(axis=1)
            other = int(holders[after.argmin()])
            if other != node and after.min() < loads[node].max() - 1e-9:
                owner[item] = other
                loads[node] -= shares[item]
                loads[other] += shares[item]
                given += 1
    return given
