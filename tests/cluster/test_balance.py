"""Balance of parts and of owners: what may never get worse, and what must be reached where it can be."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rcllm.cluster.balance import balanced
from rcllm.cluster.evaluate import held_table
from rcllm.cluster.ownership import adopted, imbalance, relabelled
from rcllm.cluster.partition import PARTITIONS, Division, fit
from rcllm.cluster.placement import Room
from rcllm.cluster.statistics import FloatArray, IntArray, Statistics
from rcllm.cluster.strata import divide
from tests.cluster.made import logs, placement_of, statistics_of

_LIMIT = 1.05


def excess(parts: IntArray, weights: FloatArray, num_parts: int) -> float:
    """The sum over parts and kinds of the square of what is over the limit."""
    total = 0.0
    for kind in weights:
        full = max(kind.sum(), 1e-12) / num_parts * _LIMIT
        total += sum(max(0.0, kind[parts == part].sum() / full - 1.0) ** 2 for part in range(num_parts))
    return total


def test_edges_are_won_back_where_there_is_room() -> None:
    """Items 0 and 1 are asked for together, as are 2 and 3; parts cut through both."""
    statistics = statistics_of([[0, 1], [2, 3]] * 3, [1] * 4)
    parts = balanced(np.array([0, 1, 0, 1]), np.ones((1, 4)), statistics.near, 2, limit=1.5)
    assert parts[0] == parts[1]
    assert parts[2] == parts[3]


def test_of_good_moves_the_one_that_loses_least_is_made() -> None:
    """Part 0 has one item too many. Item 2 has no edges there, the others hold together."""
    statistics = statistics_of([[0, 1], [0, 1], [3, 4]], [1] * 5)
    parts = balanced(np.array([0, 0, 0, 1, 1]), np.ones((1, 5)), statistics.near, 2, limit=1.2)
    assert parts.tolist() == [0, 0, 0, 1, 1], "three of five are within 1.2 of the mean"
    parts = balanced(np.array([0, 0, 0, 0, 1]), np.ones((1, 5)), statistics.near, 2, limit=1.2)
    assert parts.tolist() == [0, 0, 0, 1, 1], "item 3 belongs to item 4"


@settings(max_examples=60, deadline=None)
@given(logs(), st.integers(1, 4), st.integers(0, 99))
def test_no_step_adds_excess(statistics: Statistics, num_parts: int, seed: int) -> None:
    before = np.random.default_rng(seed).integers(0, num_parts, statistics.num_items)
    weights = np.stack([statistics.num_bytes.astype(np.float64), statistics.heat])
    after = balanced(before, weights, statistics.near, num_parts, _LIMIT)
    assert after.shape == before.shape
    assert ((after >= 0) & (after < num_parts)).all()
    assert excess(after, weights, num_parts) <= excess(before, weights, num_parts) + 1e-9


@pytest.mark.parametrize("seed", range(4))
def test_many_small_items_are_always_balanced(seed: int) -> None:
    """Heat has a heavy tail, bytes vary fourfold, and all of it begins on one node in three."""
    random = np.random.default_rng(seed)
    rows = [random.choice(300, 5, replace=False) for _ in range(600)]
    statistics = statistics_of(rows, random.integers(50, 200, 300).tolist())
    weights = np.stack([statistics.num_bytes.astype(np.float64), random.pareto(2.5, 300) + 1])
    parts = balanced(random.integers(0, 2, 300), weights, statistics.near, 6, _LIMIT)
    loads = np.stack([np.bincount(parts, kind, 6) for kind in weights])
    assert (loads.max(axis=1) <= _LIMIT * loads.mean(axis=1) + 1e-9).all()


@settings(max_examples=60, deadline=None)
@given(logs(), st.integers(1, 4), st.floats(0.3, 3), st.sampled_from(sorted(PARTITIONS)))
def test_every_partition_fits_and_evicts_only_what_must_be(
    statistics: Statistics, num_nodes: int, copies: float, name: str
) -> None:
    room = Room(num_nodes, max(int(copies * statistics.num_bytes.sum() / num_nodes), int(statistics.num_bytes.min())))
    strata = divide(statistics, room)
    division = fit(statistics, Division(strata, PARTITIONS[name](statistics, strata, room, 0)), room)
    sharded = division.strata.sharded
    used = np.bincount(division.owner[sharded], statistics.num_bytes[sharded], num_nodes)
    free = room.node_bytes - statistics.num_bytes[strata.replicated].sum() - used
    assert (free >= 0).all()
    late = division.strata.evicted & ~strata.evicted
    assert all(statistics.num_bytes[item] > free.max() for item in np.flatnonzero(late)), "it would have fitted"


def test_owners_of_items_with_one_holder_stay() -> None:
    placement = placement_of([0, 0, 0, 1], [[], []], 4)
    assert relabelled(placement, np.ones(4)).owner.tolist() == [0, 0, 0, 1]


def test_the_copies_that_owners_gave_away_are_wanted_most() -> None:
    placement = placement_of([0, 0, 0, 1], [[3], [0, 1, 2]], 4)
    found = relabelled(placement, np.array([1.0, 1.0, 1.0, 1.0]))
    assert imbalance(found, np.ones(4)) == 0
    gave = int(np.flatnonzero(found.owner[:3] == 1)[0])
    assert found.halos[0].tolist() == [gave, 3]
    assert gave not in found.halos[1].tolist()


def test_an_item_that_a_halo_holds_has_an_owner() -> None:
    placement = placement_of([0, 1, 0], [[], []], 4)
    placement.evicted[2] = True
    held = placement_of([0, 1, 0], [[2], [2]], 4)
    held.evicted[2] = True
    found = adopted(held)
    found.check()
    assert not found.evicted.any()
    assert (found.owner[2], [halo.tolist() for halo in found.halos]) == (0, [[], [2]])


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 4), st.integers(0, 9999))
def test_relabelling_moves_no_byte_and_never_adds_imbalance(num_nodes: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    num_items = int(random.integers(4, 40))
    owner = random.integers(0, num_nodes, num_items)
    copies = random.random((num_items, num_nodes)) < 0.5
    halos = [np.flatnonzero(copies[:, node] & (owner != node)).tolist() for node in range(num_nodes)]
    placement = placement_of(owner.tolist(), halos, num_items)
    heat = random.pareto(1.5, num_items)
    found = relabelled(placement, heat)
    found.check()
    assert (held_table(found) == held_table(placement)).all()
    assert imbalance(found, heat) <= max(imbalance(placement, heat), 0.05) + 1e-9
