"""New items: where they are asked for, else where their texts are, else where room is."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rcllm.cluster.insert import NewItem, insert, nearest_by_text
from rcllm.cluster.place import make_place
from rcllm.cluster.placement import Room
from rcllm.cluster.statistics import Statistics
from rcllm.core.ranking import ItemId
from rcllm.errors import DataError
from tests.cluster.made import logs, placement_of


def new(**given: object) -> NewItem:
    return NewItem(ItemId("new"), 1, **given)  # type: ignore[arg-type]


def test_most_cooccurrence_wins() -> None:
    placement = placement_of([0, 0, 1, 1], [[], []], 9)
    found = insert(placement, [new(asked_with={0: 1.0, 2: 2.0}, nearest=(0,))])
    found.check()
    assert (found.item_ids[-1], found.owner[-1]) == ("new", 1)


def test_else_the_nearest_text() -> None:
    placement = placement_of([0, 0, 1, 1], [[], []], 9)
    assert insert(placement, [new(nearest=(3, 0))]).owner[-1] == 1


def test_else_the_most_room() -> None:
    assert insert(placement_of([0, 0, 1], [[], []], 9), [new()]).owner[-1] == 1


def test_a_full_node_is_passed_over() -> None:
    """Node 1 is full of its own items; node 0 has room."""
    assert insert(placement_of([0, 1, 1], [[], []], 2), [new(asked_with={1: 9.0})]).owner[-1] == 0


def test_the_least_wanted_copy_gives_way() -> None:
    placement = placement_of([0, 0, 1, 1], [[2, 3], []], 4)
    found = insert(placement, [new(asked_with={0: 1.0})])
    found.check()
    assert found.owner[-1] == 0
    assert found.halos[0].tolist() == [2], "copies stand in order of what is missed most"


def test_no_room_at_all() -> None:
    found = insert(placement_of([0, 1], [[], []], 1), [new()])
    found.check()
    assert found.evicted.tolist() == [False, False, True]


def test_an_item_that_is_there() -> None:
    with pytest.raises(DataError, match="expected new items, got 'i0'"):
        insert(placement_of([0], [[]], 9), [dataclasses.replace(new(), item_id=ItemId("i0"))])


def test_nearest_by_text() -> None:
    vectors = np.eye(3, dtype=np.float32)
    asked = np.array([[0.0, 0.8, 0.6]], np.float32)
    assert nearest_by_text(vectors, asked, 2).tolist() == [[1, 2]]


@settings(deadline=None)
@given(logs(), st.integers(1, 4), st.lists(st.integers(1, 12), max_size=6))
def test_budgets_hold_and_nothing_changes_its_owner(statistics: Statistics, num_nodes: int, sizes: list[int]) -> None:
    placement = make_place("halo")(statistics, Room(num_nodes, int(statistics.num_bytes.sum())))
    found = insert(placement, [NewItem(ItemId(f"new{n}"), size) for n, size in enumerate(sizes)])
    found.check()
    assert found.owner[: placement.num_items].tolist() == placement.owner.tolist()
    assert found.num_items == placement.num_items + len(sizes)
