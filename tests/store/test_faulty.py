"""Faults come as often as they are asked for, and damage shows in the checksum."""

from __future__ import annotations

from random import Random

import pytest

from rcllm.store.faulty import Faults, FaultyStore, InjectedError
from rcllm.store.memory import MemoryStore
from rcllm.store.sealed import is_whole
from tests.contracts.keepers import BLOCK_BYTES, block, key

MANY = 400


def faulty(**faults: float) -> FaultyStore:
    return FaultyStore(MemoryStore(MANY * BLOCK_BYTES), Faults(**faults), Random(7))


def filled(**faults: float) -> FaultyStore:
    store = faulty(**faults)
    store.store.put_many({key(n): block(n % 256) for n in range(MANY)})
    return store


def about(count: int, share: float) -> bool:
    """Within four standard deviations."""
    return abs(count - share * MANY) < 4 * (MANY * share * (1 - share)) ** 0.5


def test_dropped_and_lost() -> None:
    store = faulty(dropped=0.25)
    store.put_many({key(n): block(n % 256) for n in range(MANY)})
    assert about(store.stats()[0].num_blocks, 0.75)
    keys = [key(n) for n in range(MANY)]
    lossy = filled(lost=0.25)
    assert about(len(lossy.lookup_many(keys)), 0.75)
    assert about(len(lossy.get_many(keys)), 0.75)
    assert lossy.stats()[0].num_blocks == MANY, "what is lost at one call is there at another"


@pytest.mark.parametrize("fault", ["flipped", "truncated"])
def test_damage_is_seen_by_the_checksum_and_leaves_the_block_below_as_it_is(fault: str) -> None:
    store = filled(**{fault: 0.5})
    found = store.get_many([key(n) for n in range(MANY)])
    assert len(found) == MANY
    assert about(sum(not is_whole(stored.data) for stored in found.values()), 0.5)
    below = store.store.get_many([key(n) for n in range(MANY)])
    assert all(is_whole(stored.data) for stored in below.values())


def test_a_flipped_bit_is_one_bit() -> None:
    store = filled(flipped=1.0)
    wrong, right = store.get_many([key(1)])[key(1)].data, block(1).data
    assert sum((a ^ b).bit_count() for a, b in zip(wrong, right, strict=True)) == 1


def test_calls_fail_before_or_after_they_did_their_work() -> None:
    done = failed = 0
    for seed in range(MANY):
        store = FaultyStore(MemoryStore(BLOCK_BYTES), Faults(failed=0.5), Random(seed))
        try:
            store.put_many({key(1): block(1)})
        except InjectedError:
            failed += 1
            done += store.store.stats()[0].num_blocks
    assert about(failed, 0.5)
    assert about(done, 0.25)


def test_a_slow_call_sleeps_as_long_as_it_was_told() -> None:
    slept: list[float] = []
    store = FaultyStore(MemoryStore(BLOCK_BYTES), Faults(slow=1.0, slow_s=3.0), Random(0), sleep=slept.append)
    store.get_many([key(1)])
    store.delete_owner("ann")
    assert slept == [3.0, 3.0]


def test_equal_seeds_draw_equal_faults() -> None:
    first, second = (filled(lost=0.3, flipped=0.3).get_many([key(n) for n in range(MANY)]) for _ in range(2))
    assert {key: bytes(stored.data) for key, stored in first.items()} == {
        key: bytes(stored.data) for key, stored in second.items()
    }
