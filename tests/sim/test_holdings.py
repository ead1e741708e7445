"""Where blocks are: by placement, by what nodes cached, and after failures and updates."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rcllm.cluster.view import NOWHERE
from rcllm.sim.holdings import LazyPlacement, LiveHoldings, expected_hit_rate, head_share, user_key
from rcllm.sim.options import Workload
from rcllm.sim.workload import draw_items
from tests.sim.small import placed

CATALOGUE = Workload(items=10_000, topics=100, item_tokens=100, item_spread=0.0)
ITEM_BYTES = 1000.0


def lazy(num_nodes: int, room: float, hot: int = 0, *, by_topic: bool = True) -> LazyPlacement:
    """`room`: items of one node."""
    return LazyPlacement.of(CATALOGUE, num_nodes, room * ITEM_BYTES, ITEM_BYTES, hot, by_topic=by_topic)


@pytest.mark.parametrize("by_topic", [True, False])
@pytest.mark.parametrize("num_nodes", [1, 8, 130, 199, 200, 250])
def test_nodes_hold_what_they_have_room_for(num_nodes: int, by_topic: bool) -> None:
    room = 15_000 / num_nodes
    placement = lazy(num_nodes, room, 10, by_topic=by_topic)
    counts = np.zeros(num_nodes)
    for item in range(CATALOGUE.items):
        held = placement.held(item)
        counts += held.everywhere
        for node in held.nodes:
            counts[node] += 1
    assert counts.sum() >= CATALOGUE.items, "there is room for all"
    assert counts.mean() <= room + 1
    assert counts.max() <= 1.35 * counts.mean(), "no node holds much more than the others"
    assert counts.min() >= 0.65 * counts.mean(), "or much less"


def test_a_topic_is_on_one_node() -> None:
    placement = lazy(8, 10_000)
    homes = {placement.owner(item) for item in range(42, CATALOGUE.items, CATALOGUE.topics)}
    assert len(homes) == 1
    cut = {lazy(300, 10_000).owner(item) for item in range(42, CATALOGUE.items, CATALOGUE.topics)}
    assert len(cut) == 3, "with more nodes than topics it is cut"
    assert {placement.owner(item) for item in range(100)} == set(range(8))


def test_what_does_not_fit_is_nowhere_and_spare_room_holds_the_head() -> None:
    tight = lazy(4, 1000, hot=100)
    assert (tight.hot, tight.kept) == (100, 100 + 4 * 900)
    assert tight.held(tight.kept) == NOWHERE
    assert tight.held(99).everywhere
    spare = lazy(4, 5000, hot=100)
    assert spare.kept == CATALOGUE.items
    assert spare.hot + (CATALOGUE.items - spare.hot) / 4 == pytest.approx(5000, abs=1)
    assert lazy(1, 20_000).held(9_999).nodes or lazy(1, 20_000).held(9_999).everywhere


def test_users_are_not_placed() -> None:
    assert lazy(4, 1000).held(user_key(0)) == NOWHERE


@pytest.mark.parametrize("hot", [10, 100, 2000])
def test_the_share_of_the_head_is_what_is_drawn(hot: int) -> None:
    rng = np.random.default_rng(0)
    items = draw_items(CATALOGUE, rng.integers(CATALOGUE.topics, size=200_000), rng)
    assert (items < hot).mean() == pytest.approx(head_share(CATALOGUE, hot), abs=0.01)


@pytest.mark.parametrize("num_nodes", [1, 8, 40, 200, 1300, 2000, 2500])
@pytest.mark.parametrize("spread", [0.0, 0.002, 0.02])
def test_the_expected_hit_rate_is_what_owners_get(num_nodes: int, spread: float) -> None:
    workload = replace(CATALOGUE, topics=1000, items=100_000, locality=0.7, spread=spread)
    placement = LazyPlacement.of(workload, num_nodes, 60_000e3 / num_nodes, 1e3, 50, by_topic=True)
    rng = np.random.default_rng(0)
    topics = rng.integers(workload.topics, size=40_000)
    items = draw_items(workload, topics, rng)
    owners = [Counter(map(placement.owner, range(topic, workload.items, workload.topics))) for topic in range(1000)]
    homes = [owners[topic].most_common(1)[0][0] for topic in topics]
    hits = [_is_on(placement, int(item), home) for item, home in zip(items, homes, strict=True)]
    assert np.mean(hits) == pytest.approx(expected_hit_rate(workload, placement), abs=0.025)


def _is_on(placement: LazyPlacement, item: int, node: int) -> bool:
    held = placement.held(item)
    return held.everywhere or node in held.nodes


# ---- what changes ---------------------------------------------------------------------------------------------------


def test_copies_come_and_go() -> None:
    live = LiveHoldings(placed([1], [2]), 2)
    live.add_copy(1, 1)
    assert live.held(1).nodes == (0, 1)
    assert (live.holds(1, 1), live.is_placed(1, 1)) == (True, False)
    live.drop_copy(1, 1)
    assert live.held(1).nodes == (0,)
    live.drop_copy(1, 1)
    live.add_copy(0, 7)
    assert live.held(7).nodes == (0,), "of an item that is placed nowhere"


def test_an_outdated_item_is_only_where_it_was_built_anew() -> None:
    live = LiveHoldings(placed([1], []), 2)
    live.outdate(1)
    assert live.held(1) == NOWHERE
    live.add_copy(1, 1)
    assert live.held(1).nodes == (1,)
    live.renew(1)
    assert live.held(1).nodes == (0, 1)


def test_an_item_that_changed_twice_is_renewed_twice() -> None:
    live = LiveHoldings(placed([1]), 1)
    live.outdate(1)
    live.outdate(1)
    live.renew(1)
    assert live.held(1) == NOWHERE
    live.renew(1)
    assert live.held(1).nodes == (0,)
    live.renew(1)
    assert live.held(1).nodes == (0,)


def test_a_lost_node_holds_nothing_until_it_has_it_again() -> None:
    live = LiveHoldings(lazy(2, 6_000, hot=5), 2)
    live.lose(0)
    assert live.held(0).nodes == (1,), "what was everywhere is on the others"
    mine = next(item for item in range(10_000) if live.placed_on(item).nodes == (0,))
    assert live.held(mine) == NOWHERE
    assert not live.bytes_of(0)
    assert sum(live.placed_bytes(0).values()) > 0
    live.regain(0)
    assert live.held(mine).nodes == (0,)
    assert live.held(0).everywhere


@given(st.lists(st.tuples(st.sampled_from(["add", "drop"]), st.integers(0, 3), st.integers(0, 4)), max_size=60))
def test_copies_are_a_set(steps: list[tuple[str, int, int]]) -> None:
    live, model = LiveHoldings(placed([], [], [], []), 4), set[tuple[int, int]]()
    for what, node, key in steps:
        if what == "add":
            live.add_copy(node, key)
            model.add((node, key))
        else:
            live.drop_copy(node, key)
            model.discard((node, key))
    for key in range(5):
        assert live.held(key).nodes == tuple(sorted(node for node, each in model if each == key))
