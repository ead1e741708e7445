"""The contract of every store: it may lose what it was given, and never returns anything else."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from rcllm.core.ranking import ContentKey
from rcllm.store.contract import Store, Stored
from rcllm.store.memory import MemoryStore
from rcllm.store.null import NullStore

BLOCK_BYTES = 96
STORES: dict[str, Callable[[], Store]] = {
    "null": NullStore,
    "memory": lambda: MemoryStore(10 * BLOCK_BYTES),
    "memory, no room": lambda: MemoryStore(BLOCK_BYTES - 1),
}


@pytest.fixture(params=STORES)
def store(request: pytest.FixtureRequest) -> Store:
    return STORES[request.param]()


def key(number: int) -> ContentKey:
    return ContentKey(number.to_bytes(32, "big"))


def block(number: int, owner: str | None = None) -> Stored:
    return Stored(memoryview(bytes([number]) * BLOCK_BYTES), 1.0 + number, owner)


def read(store: Store, *numbers: int) -> dict[int, Stored]:
    """What it has of `numbers`, checked to be what was put."""
    found = store.get_many([key(n) for n in numbers])
    assert found.keys() <= {key(n) for n in numbers}
    by_number = {int.from_bytes(k, "big"): stored for k, stored in found.items()}
    for number, stored in by_number.items():
        assert stored.data == block(number).data
        assert stored.cost == block(number).cost
    return by_number


def test_an_empty_store_has_nothing(store: Store) -> None:
    assert read(store, 1, 2) == {}
    assert store.lookup_many([key(1), key(2)]) == {}
    assert store.get_many([]) == {}
    assert store.lookup_many([]) == {}
    assert store.delete_owner("nobody") == 0
    assert store.stats().num_blocks == store.stats().num_bytes == 0


def test_what_it_has_is_what_was_put(store: Store) -> None:
    store.put_many({key(n): block(n, f"owner {n}") for n in range(5)})
    store.put_many({})
    found = read(store, *range(8))
    looked_up = store.lookup_many([key(n) for n in range(8)])
    assert looked_up.keys() == {key(n) for n in found}
    assert all(each.num_bytes == BLOCK_BYTES and each.ms > 0 for each in looked_up.values())
    assert all(stored.owner == f"owner {n}" for n, stored in found.items())
    assert store.stats().num_blocks == len(found)


def test_it_stays_within_its_budget(store: Store) -> None:
    for n in range(50):
        store.put_many({key(n): block(n)})
        stats = store.stats()
        assert stats.num_bytes <= stats.budget_bytes
        assert stats.num_bytes == stats.num_blocks * BLOCK_BYTES
    read(store, *range(50))


def test_putting_again_changes_nothing(store: Store) -> None:
    for _ in range(3):
        store.put_many({key(1): block(1)})
    assert store.stats().num_blocks == len(read(store, 1))


def test_after_an_owner_is_deleted_none_of_its_blocks_can_be_read(store: Store) -> None:
    store.put_many({key(n): block(n, "ann" if n % 2 else "bob") for n in range(6)})
    held = len(read(store, 1, 3, 5))
    others = read(store, 0, 2, 4).keys()
    assert store.delete_owner("ann") == held
    assert read(store, 1, 3, 5) == {}
    assert store.lookup_many([key(n) for n in (1, 3, 5)]) == {}
    assert read(store, 0, 2, 4).keys() == others
    assert store.delete_owner("ann") == 0


def test_threads_never_get_a_wrong_block(store: Store) -> None:
    def work(seed: int) -> None:
        for n in range(seed, seed + 40):
            store.put_many({key(n % 20): block(n % 20, f"owner {n % 3}")})
            read(store, *range(n % 20))
            if n % 10 == 0:
                store.delete_owner(f"owner {n % 3}")

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(work, range(8)))
    if isinstance(store, MemoryStore):
        store.check()
