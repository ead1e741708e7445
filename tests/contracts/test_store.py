"""The contract of every store: it may lose what it was given, and never returns anything else."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from rcllm.store.contract import Store, Stored
from rcllm.store.owners import one_name
from tests.contracts.keepers import BLOCK_BYTES, KEEPERS, LASTING, Place, block, check, key, settle, version_of


@pytest.fixture(params=KEEPERS)
def store(request: pytest.FixtureRequest, place: Place) -> Iterator[Store]:
    made = KEEPERS[request.param](place)
    yield made
    check(made)
    made.close()


def read(store: Store, *numbers: int) -> dict[int, Stored]:
    """What it has of `numbers`, checked to be blocks that were put."""
    found = store.get_many([key(n) for n in numbers])
    assert found.keys() <= {key(n) for n in numbers}
    by_number = {int.from_bytes(k, "big"): stored for k, stored in found.items()}
    assert all(version_of(number, stored) is not None for number, stored in by_number.items())
    return by_number


def test_an_empty_store_has_nothing(store: Store) -> None:
    assert read(store, 1, 2) == {}
    assert store.lookup_many([key(1), key(2)]) == {}
    assert store.get_many([]) == {}
    assert store.lookup_many([]) == {}
    assert store.delete_owner("nobody") == 0
    assert all(tier.num_blocks == tier.num_bytes == 0 for tier in store.stats())


def test_what_it_has_is_what_was_put(store: Store) -> None:
    store.put_many({key(n): block(n, f"owner {n}") for n in range(5)})
    store.put_many({})
    looked_up = store.lookup_many([key(n) for n in range(8)])
    found = read(store, *range(8))
    assert looked_up.keys() == {key(n) for n in found}
    assert all(each.num_bytes == BLOCK_BYTES for each in looked_up.values())
    assert all(one_name(stored.owner) == one_name(f"owner {n}") for n, stored in found.items())


def test_a_tier_is_told_with_what_it_has(store: Store) -> None:
    store.put_many({key(n): block(n) for n in range(3)})
    settle(store)
    tiers = store.stats()
    assert max((tier.num_blocks for tier in tiers), default=0) == len(read(store, 0, 1, 2))
    assert all(tier.num_bytes == tier.num_blocks * BLOCK_BYTES for tier in tiers)
    found = store.lookup_many([key(0), key(1), key(2)])
    assert {each.tier for each in found.values()} <= {tier.tier for tier in tiers}


def test_owners_and_spaces_may_be_any_text(store: Store) -> None:
    owners = [None, "", "=", "a b*[x]", "ü\udc80", "o:" + "x" * 300]
    store.put_many({key(n): block(n, owner) for n, owner in enumerate(owners)})
    for n, stored in read(store, *range(len(owners))).items():
        assert one_name(stored.owner) == one_name(owners[n])
    store.delete_owner("")
    assert 1 not in read(store, 1)
    store.delete_owner("ü\udc80")
    assert 4 not in read(store, 4)


def test_it_stays_within_its_budget(store: Store) -> None:
    for n in range(50):
        store.put_many({key(n): block(n)})
        if n % 10 == 0:
            settle(store)
            for tier in store.stats():
                assert tier.num_bytes <= tier.budget_bytes
                assert tier.num_bytes == tier.num_blocks * BLOCK_BYTES
    read(store, *range(50))


def test_a_block_too_large_for_it_replaces_nothing_by_something_else(store: Store) -> None:
    store.put_many({key(1): block(1)})
    large = replace(block(1), data=memoryview(bytes(1 << 20)))
    store.put_many({key(1): large})
    found = store.get_many([key(1)])
    assert all(stored.data in (block(1).data, large.data) for stored in found.values())


def test_what_is_put_replaces_what_is_there(store: Store) -> None:
    for version in range(3):
        store.put_many({key(1): block(1, f"owner {version}", version)})
        for number, stored in read(store, 1).items():
            assert version_of(number, stored) == version
            assert one_name(stored.owner) == one_name(f"owner {version}")
    settle(store)
    assert all(tier.num_blocks <= 1 for tier in store.stats())
    store.delete_owner("owner 0")
    for number, stored in read(store, 1).items():
        assert version_of(number, stored) == 2
    store.delete_owner("owner 2")
    assert read(store, 1) == {}


def test_it_copies_what_it_keeps(store: Store) -> None:
    """A view of what is not the block's own may change afterwards, as a tier's memory map does."""
    lent = array("B", block(1).data)
    store.put_many({key(1): replace(block(1), data=memoryview(lent))})
    lent[:] = array("B", bytes(len(lent)))
    read(store, 1)
    settle(store)
    read(store, 1)


def test_after_an_owner_is_deleted_none_of_its_blocks_can_be_read(store: Store) -> None:
    store.put_many({key(n): block(n, "ann" if n % 2 else "bob") for n in range(6)})
    held = len(read(store, 1, 3, 5))
    others = read(store, 0, 2, 4).keys()
    assert store.delete_owner("ann") == held
    assert read(store, 1, 3, 5) == {}
    assert store.lookup_many([key(n) for n in (1, 3, 5)]) == {}
    assert read(store, 0, 2, 4).keys() == others
    assert store.delete_owner("ann") == 0


def test_an_owner_may_come_back(store: Store) -> None:
    for version in range(3):
        store.put_many({key(1): block(1, "ann", version)})
        for number, stored in read(store, 1).items():
            assert version_of(number, stored) == version
        store.delete_owner("ann")
        assert read(store, 1) == {}


def test_threads_never_get_a_wrong_block(store: Store) -> None:
    def work(seed: int) -> None:
        for n in range(seed, seed + 40):
            store.put_many({key(n % 20): block(n % 20, f"owner {n % 3}")})
            read(store, *range(n % 20))
            if n % 10 == 0:
                store.delete_owner(f"owner {n % 3}")

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(work, range(8)))


@pytest.mark.parametrize("name", sorted(LASTING))
def test_what_lasts_is_there_again(name: str, place: Place) -> None:
    first = KEEPERS[name](place)
    first.put_many({key(n): block(n, "ann") for n in range(5)})
    first.close()
    again = KEEPERS[name](place)
    assert read(again, *range(5)).keys() == set(range(5))
    assert again.delete_owner("ann") == 5
    again.close()
