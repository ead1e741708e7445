"""The byte budget and the pins."""

from __future__ import annotations

import pytest

from rcllm.core.ranking import ContentKey
from rcllm.errors import CapacityError
from rcllm.store.index import Entry, Index


def key(number: int) -> ContentKey:
    return ContentKey(bytes([number]))


def filled(budget: int, *sizes: int) -> Index:
    index = Index(budget)
    for number, size in enumerate(sizes):
        assert index.make_room(size) == []
        index.add(key(number), Entry(size, float(size), f"owner {number % 2}"))
    index.check()
    return index


def test_room_is_made_by_evicting_the_oldest_of_equals() -> None:
    index = filled(10, 3, 3, 3)
    assert index.make_room(4) == [key(0)]
    index.add(key(9), Entry(4, 4.0, None))
    assert index.used == 10
    assert index.evictions == 1
    index.check()


def test_a_budget_filled_to_the_last_byte_evicts_nothing() -> None:
    index = filled(9, 3, 3)
    assert index.make_room(3) == []


def test_what_cannot_fit_changes_nothing_and_says_what_to_do() -> None:
    index = filled(10, 3, 3, 3)
    index.pin(key(1))
    with pytest.raises(CapacityError, match=r"do not fit.*in use by running requests.*cache\.memory_mb"):
        index.make_room(8)
    assert list(index) == [key(0), key(1), key(2)]
    assert (index.used, index.evictions) == (9, 0)
    index.check()
    assert index.make_room(7) == [key(0), key(2)]


def test_pins_count() -> None:
    index = filled(4, 4)
    index.pin(key(0))
    index.pin(key(0))
    index.unpin(key(0))
    with pytest.raises(CapacityError):
        index.make_room(1)
    index.unpin(key(0))
    assert index.make_room(1) == [key(0)]


def test_what_is_listed_is_taken_used_and_pinned() -> None:
    index = filled(10, 3, 3, 3)
    assert index.take([key(0), key(7), key(2)]) == [key(0), key(2)]
    assert [index.is_pinned(key(number)) for number in (0, 1, 2, 7)] == [True, False, True, False]
    index.unpin(key(0))
    assert index.make_room(7) == [key(1), key(0)], "the one that was used last goes last"


def test_unpinning_too_often_is_our_own_mistake() -> None:
    index = filled(4, 4)
    with pytest.raises(AssertionError, match="unpinned more often"):
        index.unpin(key(0))


def test_owners_are_found() -> None:
    index = filled(10, 1, 1, 1)
    assert index.owned_by(["owner 0"]) == [key(0), key(2)]
    assert index.owned_by(["nobody"]) == []


def test_check_prints_the_numbers() -> None:
    index = filled(10, 3)
    index.used = 4
    with pytest.raises(AssertionError, match="used 4, sum 3, budget 10, 1 entries"):
        index.check()
