"""What is left of a node's memory: copies of the items that the requests routed to it miss most.

Routing and copies depend on each other: copies follow the requests, and requests follow the copies. So both are found
in rounds, from the owners alone. In the first rounds a request counts for all nodes that come close to its best one, in
the last for its best alone (deterministic annealing; Rose 1998), which keeps rounds from ending where they began. An
item's owner may drift to the holder that wants it most, and its old owner has room for another copy.
Invariant: copies of a node are in its room, most wanted first; equal arguments give equal copies and owners.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import sparse

from rcllm.cluster.partition import Division
from rcllm.cluster.placement import Room
from rcllm.cluster.statistics import IntArray, Statistics, incidence

Table = npt.NDArray[np.float32]
_COOLED = 4  # last rounds, in which a request counts for one node
_SETTLED = 2  # last rounds, from which on owners stay
_STEPS = 5  # by which prices follow the load, in each round
_STEP, _SLOWER = 0.5, 0.9


@dataclass(frozen=True, slots=True)
class HaloConfig:
    """How copies are found."""

    rounds: int = 30  # 1: the misses of requests that are routed by the owners alone
    temperature: float = 4.0  # items by which another node may be worse and still count, in the first round
    smoothing: float = 1.0  # weight of what is asked for together with what was missed
    spread: bool = False  # whether requests are priced away from nodes that would get more than their share
    drifts: bool = True  # whether owners follow the requests


@dataclass(frozen=True, slots=True)
class Halos:
    """By node the copies, most wanted first; and the owners."""

    items: tuple[IntArray, ...]
    owner: IntArray  # [items]


def grow(statistics: Statistics, division: Division, room: Room, config: HaloConfig) -> Halos:
    """The copies for all nodes. Takes tables of [requests, nodes] and [items, nodes] in 32 bits."""
    division = replace(division, owner=division.owner.copy())
    owned = _owned(division, room)
    prices = np.zeros(room.num_nodes, dtype=np.float32)  # what a request pays for a node, in items
    asked = incidence(statistics.sample, statistics.num_items).astype(np.float32)
    held, halos = owned, tuple(np.empty(0, np.int64) for _ in range(room.num_nodes))
    if not len(statistics.sample):
        return Halos(halos, division.owner)
    for number in range(config.rounds):
        hits = asked @ held
        if config.spread:
            prices = follow_load(hits, prices, _STEPS)
        wanted = asked.T @ _shares(hits - prices, _cooled(config, number))
        settled = config.rounds - _SETTLED
        if config.drifts and 0 < number <= settled:
            _drift(division, held, wanted)
        if number >= settled and config.smoothing:
            wanted += config.smoothing * (_likely(statistics.near) @ wanted)
        if config.drifts and number == settled:
            _even_out(division, statistics.num_bytes, wanted)
        if config.drifts and number <= settled:
            owned = _owned(division, room)
        halos = _filled(statistics, owned, wanted, room)
        held = _with(owned, halos)
    return Halos(halos, division.owner)


def _drift(division: Division, held: Table, wanted: Table) -> None:
    """Gives each item to the holder that wants it most. No byte moves, and the old owner has room."""
    sharded = np.flatnonzero(division.strata.sharded)
    worth, places = np.where(held[sharded] > 0, wanted[sharded], -1.0), np.arange(len(sharded))
    best, own = worth.argmax(axis=1), division.owner[sharded]
    better = worth[places, best] > worth[places, own]
    division.owner[sharded[better]] = best[better]


def _even_out(division: Division, num_bytes: IntArray, wanted: Table) -> None:
    """Gives what nodes own beyond their share of the bytes to others: what they want least to who wants it most."""
    sharded = np.flatnonzero(division.strata.sharded)
    loads = np.bincount(division.owner[sharded], num_bytes[sharded], wanted.shape[1]).astype(np.int64)
    share = int(loads.mean()) + int(num_bytes.max())
    for node in np.flatnonzero(loads > share).tolist():
        own = sharded[division.owner[sharded] == node]
        for item in own[np.argsort(wanted[own, node], kind="stable")].tolist():
            if loads[node] <= share:
                break
            others = np.flatnonzero(loads + num_bytes[item] <= share)
            to = others[np.lexsort((loads[others], -wanted[item, others]))[0]]  # of equal ones the emptiest
            division.owner[item] = to
            loads[node] -= num_bytes[item]
            loads[to] += num_bytes[item]


def _owned(division: Division, room: Room) -> Table:
    """[items, nodes] 1 where a node holds an item without a halo."""
    table = np.zeros((len(division.owner), room.num_nodes), dtype=np.float32)
    sharded = np.flatnonzero(division.strata.sharded)
    table[sharded, division.owner[sharded]] = 1.0
    table[division.strata.replicated] = 1.0
    return table


def _with(owned: Table, halos: Sequence[IntArray]) -> Table:
    held = owned.copy()
    for node, items in enumerate(halos):
        held[items, node] = 1.0
    return held


def _cooled(config: HaloConfig, number: int) -> float:
    hot = config.rounds - _COOLED
    return config.temperature * (1.0 - number / hot) if number < hot else 0.0


def _shares(hits: Table, temperature: float) -> Table:
    """[requests, nodes] for how much of each node a request counts: rows sum to 1."""
    best = hits.max(axis=1, keepdims=True)
    shares = np.exp((hits - best) / temperature) if temperature > 0 else (hits >= best - 1e-4).astype(np.float32)
    return np.asarray(shares / shares.sum(axis=1, keepdims=True), dtype=np.float32)


def follow_load(hits: Table, prices: Table, steps: int) -> Table:
    """Prices, raised where more than an equal share of requests goes and lowered elsewhere; the least is 0."""
    mean, step = len(hits) / hits.shape[1], _STEP
    for _ in range(steps):
        load = np.bincount((hits - prices).argmax(axis=1), minlength=hits.shape[1]) / mean
        prices = prices + (step * np.clip(load - 1.0, -1.0, 1.0)).astype(np.float32)
        step *= _SLOWER
    return np.asarray(prices - prices.min(), dtype=np.float32)


def _likely(near: Any) -> Any:
    """Rows that sum to 1: what is asked for together with an item, once it is asked for."""
    totals = np.asarray(near.sum(axis=1)).ravel()
    return (sparse.diags_array(1.0 / np.maximum(totals, 1e-12)) @ near).T.astype(np.float32)


def _filled(statistics: Statistics, owned: Table, wanted: Table, room: Room) -> tuple[IntArray, ...]:
    """By node the items that are wanted most per byte, while there is room."""
    num_bytes = statistics.num_bytes
    free = room.node_bytes - num_bytes @ owned.astype(np.float64)
    halos = []
    for node in range(room.num_nodes):
        worth = np.where(owned[:, node] > 0, 0.0, wanted[:, node] / np.maximum(num_bytes, 1))
        useful = np.flatnonzero(worth > 0)
        order = useful[np.argsort(-worth[useful], kind="stable")]
        halos.append(_taken(order, num_bytes, int(free[node])))
    return tuple(halos)


def _taken(order: IntArray, num_bytes: IntArray, free: int) -> IntArray:
    """The items of `order` that fit, one after another; those that are too large are passed over."""
    fits = int(np.searchsorted(np.cumsum(num_bytes[order]), free, side="right"))
    taken = order[:fits].tolist()
    free -= int(num_bytes[order[:fits]].sum())
    smallest = int(num_bytes.min())
    for item in order[fits:].tolist():
        if free < smallest:
            break
        if num_bytes[item] <= free:
            taken.append(item)
            free -= int(num_bytes[item])
    return np.array(taken, dtype=np.int64)
