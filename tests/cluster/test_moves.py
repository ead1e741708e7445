"""Plans of moves: bounded, each step whole, nothing lost; and numbers of nodes that keep bytes where they are."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rcllm.cluster.evaluate import held_table
from rcllm.cluster.moves import differing, matched, plan_moves
from rcllm.cluster.place import PLACES, make_place
from rcllm.cluster.placement import Room
from rcllm.cluster.statistics import Statistics
from rcllm.errors import DataError
from tests.cluster.made import logs, placement_of

ONES = np.ones(6)


def test_a_move_by_hand() -> None:
    """Item 0 goes to node 1, which gives up its copy of item 5 for it; node 2 owns 5 and keeps it."""
    old = placement_of([0, 0, 1, 1, 2, 2], [[], [5], []], 3)
    new = placement_of([1, 0, 1, 1, 2, 2], [[], [], []], 3)
    plan = plan_moves(old, new, ONES)
    (move,) = plan.moves
    assert (move.item_id, move.source, move.target, move.becomes_owner, move.dropped) == ("i0", 0, 1, True, ("i5",))
    assert plan.after.owner.tolist() == [1, 0, 1, 1, 2, 2]
    assert plan.num_left == 0
    assert plan.after.halos[0].tolist() == [0], "what nobody needs the room of stays as a copy"


def test_the_bound_holds_and_hot_items_go_first() -> None:
    old = placement_of([0, 0, 0, 1, 1, 1], [[], []], 6)
    new = placement_of([0, 0, 0, 1, 1, 1], [[3, 4, 5], [0, 1, 2]], 6)
    heat = np.array([1.0, 5.0, 2.0, 0.0, 9.0, 3.0])
    plan = plan_moves(old, new, heat, max_moves=3)
    assert [(move.item_id, move.target) for move in plan.moves] == [("i4", 0), ("i1", 1), ("i5", 0)]
    assert plan.num_left == 3
    assert plan_moves(old, new, heat, max_moves=0).moves == ()


def test_an_owner_that_has_a_copy_takes_over_without_a_move() -> None:
    old = placement_of([0, 1], [[], [0]], 2)
    plan = plan_moves(old, placement_of([1, 1], [[0], []], 2), np.ones(2))
    assert plan.moves == ()
    assert plan.after.owner.tolist() == [1, 1]


def test_a_full_exchange_needs_room_and_says_so() -> None:
    old, new = placement_of([0, 1], [[], []], 1), placement_of([1, 0], [[], []], 1)
    plan = plan_moves(old, new, np.ones(2))
    assert (plan.moves, plan.num_left) == ((), 2)


def test_becoming_replicated() -> None:
    old = placement_of([0, 0, 1], [[], [], []], 3)
    new = placement_of([0, 0, 1], [[], [], []], 3, replicated=[0])
    assert plan_moves(old, new, np.ones(3)).after.replicated.tolist() == [True, False, False]
    assert not plan_moves(old, new, np.ones(3), max_moves=1).after.replicated.any(), "one node lacks it yet"
    assert dict(differing(old, new))["became replicated"] == 1


def test_nodes_are_numbered_so_that_bytes_stay() -> None:
    old = placement_of([0, 0, 1, 1, 2, 2], [[4], [], []], 6)
    turned = placement_of([2, 2, 0, 0, 1, 1], [[], [], [4]], 6)
    found = matched(old, turned)
    assert found.owner.tolist() == old.owner.tolist()
    assert found.halos[0].tolist() == [4]
    assert plan_moves(old, found, ONES).moves == ()


def test_other_items_or_nodes() -> None:
    one = placement_of([0, 0], [[], []], 2)
    for other, what in (
        (placement_of([0, 0, 0], [[], []], 3), "items"),
        (placement_of([0, 0], [[], [], []], 2), "nodes"),
    ):
        with pytest.raises(DataError, match=f"expected two placements with the same .*{what}"):
            plan_moves(one, other, np.ones(2))


def test_nodes_that_lose_memory() -> None:
    with pytest.raises(DataError, match="as much memory as now, got 2 bytes after 3"):
        plan_moves(placement_of([0, 1], [[], []], 3), placement_of([0, 1], [[], []], 2), np.ones(2))


@settings(max_examples=80, deadline=None)
@given(logs(), st.integers(1, 4), st.floats(1.1, 3), st.sampled_from(sorted(PLACES)), st.integers(0, 12))
def test_every_plan_is_bounded_whole_and_loses_nothing(
    statistics: Statistics, num_nodes: int, copies: float, policy: str, max_moves: int
) -> None:
    node_bytes = int(copies * statistics.num_bytes.sum() / num_nodes) + int(statistics.num_bytes.max())
    room = Room(num_nodes, node_bytes)
    old = make_place("random")(statistics, room)
    new = matched(old, make_place(policy)(statistics, room))
    new.check()
    plan = plan_moves(old, new, statistics.heat, max_moves)
    plan.after.check()
    assert len(plan.moves) <= max_moves
    assert not (plan.after.evicted & ~old.evicted & ~new.evicted).any(), "an item was lost"
    missing = held_table(new) > held_table(plan.after)
    assert plan.num_left == missing.sum()
    for move in plan.moves:
        assert move.source != move.target
    whole = plan_moves(old, new, statistics.heat)
    whole.after.check()
    if whole.num_left == 0:
        assert (whole.after.owner[new.sharded] == new.owner[new.sharded]).all()
