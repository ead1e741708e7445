"""Placement: strata, parts, halos and owners by hand, and what must hold of every placement."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rcllm.cluster.balance import balanced
from rcllm.cluster.evaluate import evaluate, held_table
from rcllm.cluster.halo import HaloConfig, follow_load, grow
from rcllm.cluster.options import PolicyName
from rcllm.cluster.ownership import imbalance, relabelled
from rcllm.cluster.partition import Division, by_hash, by_popularity, fit
from rcllm.cluster.place import PLACES, make_place
from rcllm.cluster.placement import PlacedHoldings, Placement, Room
from rcllm.cluster.statistics import Statistics, collect, ragged
from rcllm.cluster.strata import HEAVY, IMBALANCE, Strata, divide
from rcllm.cluster.view import EVERYWHERE, NOWHERE, Held
from rcllm.errors import CapacityError, ConfigError
from tests.cluster.made import clustered, logs, names, placement_of, statistics_of
from tests.reference import placement as slow


def sharded(statistics: Statistics) -> Strata:
    nothing = np.zeros(statistics.num_items, np.bool_)
    return Strata(nothing, nothing.copy())


# ---- strata ---------------------------------------------------------------------------------------------------------


def test_the_hottest_are_replicated_while_there_is_room() -> None:
    """Item 0 is in every request, so no node could balance it; three nodes of 8 bytes have room for it everywhere."""
    rows = [[0, 1 + number % 11] for number in range(22)]
    statistics = statistics_of(rows, [1] * 12)
    strata = divide(statistics, Room(3, 8), hot_share=0.0)
    assert np.flatnonzero(strata.replicated).tolist() == [0]
    assert not strata.evicted.any()
    assert not divide(statistics, Room(3, 4), hot_share=0.5).replicated.any(), "memory holds every item once, no more"


def test_the_coldest_per_byte_are_evicted_where_memory_is_short() -> None:
    statistics = statistics_of([[0, 1], [0, 2], [0, 1]], [1, 1, 1, 1])
    strata = divide(statistics, Room(2, 1))
    assert np.flatnonzero(~strata.evicted).tolist() == [0], "of two bytes, one stays free for imbalance"
    larger = statistics_of([[0, 1], [0, 2], [0, 1]], [9, 1, 1, 1])
    assert divide(larger, Room(2, 2)).evicted.tolist() == [True, False, False, False], "larger than a node"


def test_nothing_fits() -> None:
    with pytest.raises(CapacityError, match="got 1 bytes on each, and the smallest takes 2"):
        divide(statistics_of([[0]], [2]), Room(4, 1))


# ---- parts ----------------------------------------------------------------------------------------------------------


def test_popularity_deals_in_order_of_heat() -> None:
    statistics = statistics_of([[0], [2], [2], [1], [1], [1]], [1] * 4)
    assert by_popularity(statistics, sharded(statistics), Room(2, 9), 0).tolist() == [0, 0, 1, 1]


def test_hash_depends_on_the_id_alone() -> None:
    few, many = statistics_of([[0]], [1] * 5), statistics_of([[3]], [1] * 50)
    owners = by_hash(many, sharded(many), Room(7, 99), 0)
    assert by_hash(few, sharded(few), Room(7, 99), 0).tolist() == owners[:5].tolist()
    assert len(set(owners.tolist())) == 7


def test_what_does_not_fit_moves_to_the_emptiest_node_coldest_first() -> None:
    statistics = statistics_of([[0], [0], [1], [2], [2], [2]], [1] * 4)
    division = Division(sharded(statistics), np.zeros(4, np.int64))
    found = fit(statistics, division, Room(2, 3))
    assert found.owner.tolist() == [0, 0, 0, 1]
    tight = fit(statistics, division, Room(2, 1))
    assert tight.strata.evicted.tolist() == [False, True, False, True]
    assert tight.owner.tolist()[::2] == [1, 0]


def test_metis_finds_the_groups_and_balances_both() -> None:
    requests, num_items = clustered(8, 30, 3000)
    statistics = collect(requests, names(num_items), np.random.default_rng(0).integers(50, 150, num_items))
    placement = make_place("metis")(statistics, Room(8, int(2 * statistics.num_bytes.sum() / 8)))
    report = evaluate(placement, statistics, requests)
    assert report.balance.num_bytes <= 1 + IMBALANCE + 1e-9
    assert report.balance.heat <= 1 + IMBALANCE + 1e-9
    assert report.best > 0.85, "groups lie together"
    assert report.edge_cut < 0.3
    assert evaluate(make_place("hash")(statistics, placement.room), statistics, requests).best < 0.5


def test_balancing_two_weights_by_moves_and_swaps() -> None:
    """Two heavy items in a part of two, two light ones in the other: no move helps, a swap does."""
    graph = statistics_of([[0, 1], [2, 3]], [1] * 4).near
    weights = np.array([[1.0, 1, 1, 1], [9.0, 9, 1, 1]])
    parts = balanced(np.array([0, 0, 1, 1]), weights, graph, 2, 1.05)
    assert np.bincount(parts, weights[1]).tolist() == [10, 10]
    assert np.bincount(parts).tolist() == [2, 2]


def test_what_cannot_be_balanced_stays() -> None:
    graph = statistics_of([[0, 1], [0, 2]], [1] * 3).near
    weights = np.array([[100.0, 1, 1]])
    parts = balanced(np.array([0, 1, 1]), weights, graph, 2, 1.05)
    assert parts[0] not in parts[1:].tolist()


def test_without_metis_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pymetis", None)
    statistics = statistics_of([[0, 1], [2, 3]], [1] * 8)
    with pytest.raises(ConfigError, match=r"pip install 'rcllm\[cluster\]'"):
        make_place("metis")(statistics, Room(2, 5))
    make_place("hash")(statistics, Room(2, 5)).check()


# ---- halos and owners -----------------------------------------------------------------------------------------------


def test_a_halo_holds_what_the_requests_of_a_node_miss_most() -> None:
    """Node 0 owns 0, 1, 2 and node 1 owns 3, 4, 5. Requests of node 0 miss 3 twice and 4 once."""
    rows = [[0, 1, 3], [0, 2, 3], [1, 2, 4], [3, 4, 5]]
    statistics = statistics_of(rows, [1] * 6)
    division = Division(sharded(statistics), np.array([0, 0, 0, 1, 1, 1]))
    once = HaloConfig(rounds=1, temperature=0.0, smoothing=0.0)
    assert [halo.tolist() for halo in grow(statistics, division, Room(2, 4), once).items] == [[3], []]
    assert [halo.tolist() for halo in grow(statistics, division, Room(2, 5), once).items] == [[3, 4], []]


def test_large_items_are_passed_over_and_smaller_ones_taken() -> None:
    statistics = statistics_of([[0, 1, 2], [0, 1, 2], [0, 1, 3]], [2, 1, 3, 1])
    division = Division(sharded(statistics), np.array([0, 0, 1, 1]))
    halos = grow(statistics, division, Room(2, 5), HaloConfig(rounds=1, temperature=0.0, smoothing=0.0)).items
    assert halos[0].tolist() == [3]


def test_smoothing_copies_what_is_asked_for_together_with_what_was_missed() -> None:
    """No request of node 0 names item 4, but requests elsewhere name it with item 3, which those of node 0 miss."""
    rows = [[0, 1, 3], [3, 4, 5], [3, 4, 5]]
    statistics = statistics_of(rows, [1] * 6)
    division = Division(sharded(statistics), np.array([0, 0, 0, 1, 1, 1]))
    plain, smooth = (
        grow(statistics, division, Room(2, 6), HaloConfig(1, 0.0, smoothing)).items[0] for smoothing in (0.0, 1.0)
    )
    assert plain.tolist() == [3]
    assert smooth.tolist() == [3, 4, 5]


def test_an_owner_drifts_to_the_holder_that_wants_its_item_most_and_leaves_room() -> None:
    """Node 0 asks for item 3, which node 1 owns, and copies it. Once node 0 owns it, node 1 has room for item 0."""
    rows = [[0, 1, 2, 3]] * 5 + [[4, 5, 6, 0]]
    statistics = statistics_of(rows, [1] * 7)
    division = Division(sharded(statistics), np.array([0, 0, 0, 1, 1, 1, 1]))
    stays, drifts = (
        grow(statistics, division, Room(2, 4), HaloConfig(10, 0.0, 0.0, drifts=which)) for which in (False, True)
    )
    assert division.owner.tolist() == stays.owner.tolist() == [0, 0, 0, 1, 1, 1, 1]
    assert [halo.tolist() for halo in stays.items] == [[3], []]
    assert drifts.owner.tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert [halo.tolist() for halo in drifts.items] == [[], [0]]


def test_nodes_own_about_the_same_bytes_however_owners_drift() -> None:
    """All requests want node 0; it gives what it wants least to the emptiest of the others."""
    rows = [list(range(count)) for count in range(2, 9)]
    statistics = statistics_of(rows, [1] * 8)
    division = Division(sharded(statistics), np.array([0, 0, 1, 1, 2, 2, 3, 3]))
    found = grow(statistics, division, Room(4, 8), HaloConfig(10, 0.0, 0.0))
    assert np.bincount(found.owner, minlength=4).max() <= 3, "the mean, and one item"
    assert found.owner[:2].tolist() == [0, 0]
    assert sorted(found.items[0].tolist()) == np.flatnonzero(found.owner).tolist(), "it still holds all"


def test_prices_follow_the_load() -> None:
    hits = np.array([[3.0, 2.0]] * 10, np.float32)
    prices = follow_load(hits, np.zeros(2, np.float32), 10)
    assert prices[0] > prices[1] == 0


def test_owners_are_relabelled_among_holders_and_no_byte_moves() -> None:
    placement = placement_of([0, 0, 0, 0, 1, 1], [[], [0, 1]], 9)
    heat = np.array([1.0, 9.0, 1.0, 1.0, 1.0, 1.0])
    assert imbalance(placement, heat) == pytest.approx(12 / 7 - 1)
    found = relabelled(placement, heat)
    found.check()
    assert found.owner[1] == 1
    assert found.owner[0] == 0, "what keeps its balance stays"
    assert (held_table(found) == held_table(placement)).all()


def test_learned_beats_one_pass_beats_metis() -> None:
    requests, num_items = clustered(12, 40, 4000, size=8)
    judged, _ = clustered(12, 40, 1000, seed=1, size=8)
    statistics = collect(requests, names(num_items), np.full(num_items, 100))
    room = Room(20, int(1.5 * statistics.num_bytes.sum() / 20))
    shares = {name: evaluate(make_place(name)(statistics, room), statistics, judged) for name in PLACES}
    assert shares["learned"].best > shares["halo"].best > shares["metis"].best > shares["hash"].best
    assert shares["spread"].balance.spread < shares["learned"].balance.requests


def test_hot_items_are_on_each_node_only_where_that_beats_the_copies_that_it_takes_room_from(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Thirty nodes with room for a group of eight each; every item has a third of a node's heat."""
    requests, num_items = clustered(12, 8, 3000)
    statistics = collect(requests, names(num_items), np.ones(num_items, np.int64))
    room = Room(30, 8)
    found = make_place("learned")(statistics, room)
    monkeypatch.setattr("rcllm.cluster.place._HEAVY", (HEAVY,))
    before = make_place("learned")(statistics, room)
    shares = [evaluate(placement, statistics, statistics.sample).best for placement in (before, found)]
    assert before.replicated.sum() > 3 > found.replicated.sum()
    assert shares[0] < 0.8 < shares[1]
    assert imbalance(found, statistics.heat) <= max(IMBALANCE, imbalance(before, statistics.heat))


# ---- what must hold of all ------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(logs(), st.integers(1, 5), st.floats(0.3, 4), st.sampled_from(sorted(PLACES)))
def test_every_item_is_placed_and_budgets_hold(
    statistics: Statistics, num_nodes: int, copies: float, policy: str
) -> None:
    room = Room(num_nodes, max(int(copies * statistics.num_bytes.sum() / num_nodes), int(statistics.num_bytes.min())))
    placement = make_place(policy)(statistics, room)
    placement.check()
    again = make_place(policy)(statistics, room)
    assert (placement.owner == again.owner).all(), "equal arguments give equal placements"
    assert all((one == other).all() for one, other in zip(placement.halos, again.halos, strict=True))
    held = held_table(placement).any(axis=1)
    assert (held == ~placement.evicted).all()
    roomy = room.node_bytes >= 2 * statistics.num_bytes.sum() / num_nodes + statistics.num_bytes.max()
    assert policy == "hash" or not (roomy and placement.evicted.any())  # hashes deal without looking at room


@settings(deadline=None)
@given(logs(), st.integers(1, 4), st.sampled_from(["hash", "halo", "learned"]))
def test_reports_equal_the_slow_twin(statistics: Statistics, num_nodes: int, policy: str) -> None:
    room = Room(num_nodes, int(statistics.num_bytes.sum()))
    placement = make_place(policy)(statistics, room)
    requests = statistics.sample
    if not len(requests):
        return
    shares = [slow.best_share(placement, requests[number].tolist()) for number in range(len(requests))]
    report = evaluate(placement, statistics, requests)
    assert report.best == pytest.approx(np.mean(shares))
    assert report.spread <= report.best + 1e-6
    assert report.owned <= report.best + 1e-6


@settings(deadline=None)
@given(logs(), st.integers(1, 4))
def test_a_router_sees_what_is_placed(statistics: Statistics, num_nodes: int) -> None:
    placement = make_place("halo")(statistics, Room(num_nodes, int(statistics.num_bytes.sum())))
    holdings = PlacedHoldings.of(placement)
    for number, item_id in enumerate(placement.item_ids):
        nodes = tuple(node for node in range(num_nodes) if slow.holds(placement, node, number))
        held = holdings.held(item_id)
        assert held == EVERYWHERE if placement.replicated[number] else held == (Held(nodes) if nodes else NOWHERE)
    assert holdings.held("a stranger") is NOWHERE
    assert dict(holdings.bytes_of(0)) == placement.bytes_of(0)


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"owner": [0, 5]}, "an owner is no node"),
        ({"halos": [[1, 1], []]}, "names an item twice"),
        ({"halos": [[0], []]}, "names an item of its own"),
        ({"node_bytes": 0}, "of 0 bytes"),
    ],
)
def test_check_tells_what_is_wrong(wrong: Mapping[str, object], why: str) -> None:
    given_: dict[str, object] = {"owner": [0, 1], "halos": [[], []], "node_bytes": 9, **wrong}
    with pytest.raises(AssertionError, match=why):
        placement_of(**given_).check()  # type: ignore[arg-type]


def test_names_and_errors() -> None:
    assert set(get_args(PolicyName)) == set(PLACES)
    with pytest.raises(ConfigError, match="Did you mean 'learned'"):
        make_place("learnt")
    with pytest.raises(ConfigError, match="expected one node or more, got 0"):
        make_place("hash")(statistics_of([[0]], [1]), Room(0, 9))


def test_one_item_and_no_requests() -> None:
    statistics = collect(ragged([]), names(1), [5])
    for name in PLACES:
        placement: Placement = make_place(name)(statistics, Room(3, 10))
        placement.check()
        assert placement.sharded.all()
