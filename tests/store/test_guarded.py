"""A tier that fails: how long it is left alone, what is counted, and what is said."""

from __future__ import annotations

import warnings

import pytest

from rcllm.errors import StoreWarning
from rcllm.store.faulty import Faults, FaultyStore, InjectedError
from rcllm.store.guarded import FIRST_PAUSE_S, LONGEST_PAUSE_S, Breaker, GuardedStore
from rcllm.store.memory import MemoryStore
from tests.contracts.keepers import BLOCK_BYTES, block, key


class Time:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Draws:
    """In the place of a random generator: every fault that is possible happens, and before the call does its work."""

    def random(self) -> float:
        return 0.6


BROKEN, WORKING = Faults(failed=1.0), Faults()


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.fixture
def below() -> FaultyStore:
    return FaultyStore(MemoryStore(10 * BLOCK_BYTES), WORKING, Draws())  # type: ignore[arg-type]


@pytest.fixture
def guarded(below: FaultyStore, time: Time) -> GuardedStore:
    return GuardedStore(below, "disk", time)


def test_pauses_grow_to_a_longest_one_and_end_with_the_first_success(time: Time) -> None:
    breaker = Breaker(time)
    pauses = []
    for _ in range(10):
        assert breaker.lets_through()
        pauses.append(breaker.failed())
        time.now += pauses[-1] - 0.01
        assert not breaker.lets_through()
        time.now += 0.02
    assert pauses[:4] == [FIRST_PAUSE_S * 2**n for n in range(4)]
    assert pauses[-1] == LONGEST_PAUSE_S
    breaker.worked()
    assert breaker.lets_through()
    assert breaker.failed() == FIRST_PAUSE_S


def test_after_a_pause_one_caller_tries(time: Time) -> None:
    breaker = Breaker(time)
    time.now += breaker.failed()
    assert [breaker.lets_through() for _ in range(3)] == [True, False, False]
    breaker.worked()
    assert [breaker.lets_through() for _ in range(3)] == [True, True, True]


def test_errors_are_misses_that_are_counted_and_the_tier_is_left_alone(
    guarded: GuardedStore, below: FaultyStore, time: Time
) -> None:
    guarded.put_many({key(1): block(1)})
    below.faults = BROKEN
    assert guarded.get_many([key(1)]) == {}
    below.faults = WORKING
    assert guarded.get_many([key(1)]) == {}, "it would work again, but is left alone"
    assert guarded.lookup_many([key(1)]) == {}
    guarded.put_many({key(2): block(2), key(3): block(3)})
    time.now += FIRST_PAUSE_S
    assert guarded.get_many([key(1), key(2)]).keys() == {key(1)}
    (stats,) = guarded.stats()
    assert (stats.errors, stats.dropped, stats.num_blocks) == (1, 2, 1)


def test_stats_of_a_tier_that_cannot_tell_are_what_it_told_last(
    guarded: GuardedStore, below: FaultyStore, time: Time
) -> None:
    below.faults = BROKEN
    (stats,) = guarded.stats()
    assert (stats.tier, stats.num_blocks, stats.errors) == ("disk", 0, 1)
    below.faults = WORKING
    time.now += FIRST_PAUSE_S
    guarded.put_many({key(1): block(1)})
    assert guarded.stats()[0].num_blocks == 1
    below.faults = BROKEN
    (stats,) = guarded.stats()
    assert (stats.num_blocks, stats.errors) == (1, 2)


def test_erasing_asks_a_tier_that_is_left_alone_and_raises(guarded: GuardedStore, below: FaultyStore) -> None:
    guarded.put_many({key(1): block(1, "ann")})
    below.faults = BROKEN
    guarded.get_many([key(1)])
    with pytest.raises(InjectedError):
        guarded.delete_owner("ann")
    below.faults = WORKING
    assert guarded.delete_owner("ann") == 1
    guarded.put_many({key(2): block(2)})
    assert guarded.get_many([key(2)]).keys() == {key(2)}, "it works again, so it is asked again"


def test_asking_for_nothing_asks_nobody(guarded: GuardedStore, below: FaultyStore) -> None:
    below.faults = BROKEN
    assert guarded.get_many([]) == guarded.lookup_many([]) == {}
    guarded.put_many({})
    below.faults = WORKING
    assert guarded.stats()[0].errors == 0


def test_a_failure_is_said_once(guarded: GuardedStore, below: FaultyStore, time: Time) -> None:
    below.faults = BROKEN
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(5):
            guarded.get_many([key(1)])
            time.now += 1000
    assert [warning.category for warning in said] == [StoreWarning]
    assert "the disk tier of the store failed (InjectedError" in str(said[0].message)
    assert guarded.stats()[0].errors == 6


def test_where_warnings_are_errors_a_request_still_goes_on(guarded: GuardedStore, below: FaultyStore) -> None:
    below.faults = BROKEN
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert guarded.get_many([key(1)]) == {}
