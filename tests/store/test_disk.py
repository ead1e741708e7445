"""Disk as a tier, in one process: what it keeps, gives up, lends out and forgets."""

from __future__ import annotations

import gc
import json
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from rcllm.errors import StoreError
from rcllm.store.contract import Found, Stored
from rcllm.store.disk import DiskStore
from rcllm.store.owners import alias, digest
from tests.reference.eviction import SlowCache
from tests.store.disks import MB, block, key, number_of, put, served


@pytest.fixture
def store(tmp_path: Path) -> Iterator[DiskStore]:
    with DiskStore.open(tmp_path / "store", 100 * MB) as opened:
        yield opened
        opened.check()


def test_an_empty_store_has_nothing(store: DiskStore) -> None:
    assert store.lookup_many([key(1)]) == store.get_many([key(1)]) == {}
    assert store.delete_owner("item:1") == 0
    assert store.stats()[0].num_blocks == 0


def test_blocks_outlive_the_process_that_wrote_them(tmp_path: Path) -> None:
    with DiskStore.open(tmp_path, MB) as store:
        store.put_many({key(1): block(1, 5_000, "item:a", 7.5, "model 1")})
    with DiskStore.open(tmp_path, MB) as store:
        assert store.lookup_many([key(1), key(2)]) == {key(1): Found("disk", 5_048)}
        stored = store.get_many([key(1), key(2)])[key(1)]
        assert number_of(key(1), stored, 5_000) == 1
        assert (stored.cost, stored.space, stored.num_bytes) == (7.5, "model 1", 5_048)
        assert store.stats()[0].num_bytes == 5_048


@pytest.mark.parametrize("num_bytes", [0, 4, 1_900, 1_996, 2_000, 2_004, 4_000, 4_080, 70_000])
def test_blocks_of_every_size_come_back_whole_and_in_line_with_64_bytes(store: DiskStore, num_bytes: int) -> None:
    put(store, range(3), num_bytes=num_bytes)
    assert served(store, range(3), num_bytes) == {0, 1, 2}
    for stored in store.get_many([key(0), key(1)]).values():
        kv = np.frombuffer(stored.data, np.uint8)[48:]
        assert not num_bytes or kv.__array_interface__["data"][0] % 64 == 0


def test_a_block_that_is_put_again_replaces_the_first(store: DiskStore) -> None:
    store.put_many({key(1): block(1, owner="item:a", space="x")})
    store.put_many({key(1): block(2, 8_000, owner="item:b", space="y")})
    stored = store.get_many([key(1)])[key(1)]
    assert stored.data == block(2, 8_000).data
    assert store.stats()[0].num_bytes == stored.num_bytes
    assert store.delete_owner("item:a") == 0
    assert store.delete_owner("item:b") == 1


def test_a_block_that_is_larger_than_the_budget_is_dropped_and_counted(tmp_path: Path) -> None:
    with DiskStore.open(tmp_path, 10_000) as store:
        put(store, [1])
        assert store.stats()[0].dropped == 1
        assert served(store, [1]) == set()


def test_no_name_of_an_owner_is_ever_in_the_folder(store: DiskStore) -> None:
    put(store, range(5), "user:annabelle")
    stored = store.get_many([key(1)])[key(1)]
    assert stored.owner == alias(digest("user:annabelle")) != "user:annabelle"
    store.delete_owner("user:annabelle")
    for file in store.folder.iterdir():
        assert b"annabelle" not in file.read_bytes()


@pytest.mark.parametrize("by_alias", [False, True])
def test_after_an_owner_is_deleted_none_of_its_blocks_can_be_read(store: DiskStore, by_alias: bool) -> None:
    put(store, range(0, 6), "user:ann")
    put(store, range(6, 9), "user:anne")
    put(store, range(9, 12))
    name = alias(digest("user:ann")) if by_alias else "user:ann"
    assert name is not None
    assert store.delete_owner(name) == 6
    assert served(store, range(12)) == set(range(6, 12))
    assert store.delete_owner(name) == 0


def test_each_erasure_has_a_number_for_those_who_hold_blocks_in_memory(store: DiskStore) -> None:
    assert store.erased_since(0).owners == frozenset()
    store.delete_owner("user:ann")
    first = store.erased_since(0)
    store.delete_owners(["user:bob", "item:1"])
    assert first.owners == {digest("user:ann")}
    assert store.erased_since(first.now).owners == {digest("user:bob"), digest("item:1")}
    assert store.erased_since(0).now == 3


def test_each_erasure_is_written_down_without_a_name(store: DiskStore) -> None:
    put(store, range(4), "user:ann")
    store.delete_owner("user:ann")
    line = json.loads((store.folder / "audit.jsonl").read_text().splitlines()[-1])
    assert line["owner"] == alias(digest("user:ann"))
    assert (line["blocks"], line["bytes"], line["scrubbed"]) == (4, 4 * 20_048, False)


def test_erasures_that_are_too_long_ago_are_told_as_unknown(store: DiskStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rcllm.store.disk.edit.MAX_ERASURES", 3)
    for number in range(5):
        store.delete_owner(f"user:{number}")
    assert not store.erased_since(0).complete
    assert store.erased_since(2).complete
    assert store.erased_since(2).owners == {digest(f"user:{number}") for number in (2, 3, 4)}


@pytest.mark.parametrize("seed", range(4))
def test_blocks_go_in_the_order_of_the_slow_twin(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    slow = SlowCache(12 * 4_048)
    store = DiskStore.open(tmp_path, slow.budget)
    for _ in range(120):
        number, cost, size = rng.randrange(30), rng.choice([1.0, 2.0, 50.0]), rng.choice([2_000, 4_000, 8_000])
        if rng.random() < 0.5:
            store.put_many({key(number): block(number, size, cost=cost)})
            slow.put(key(number), size + 48, cost)
        elif rng.random() < 0.9:
            got = [key(rng.randrange(30)) for _ in range(3)]
            store.get_many(got)
            for each in dict.fromkeys(got):
                slow.use(each)
        else:
            store.close()
            store = DiskStore.open(tmp_path, slow.budget)
        found = store.lookup_many([key(n) for n in range(30)])
        assert found.keys() == slow.blocks.keys()
    store.check()
    store.close()


def test_a_budget_is_raised_and_lowered_while_blocks_are_read(tmp_path: Path) -> None:
    with DiskStore.open(tmp_path, 5 * 20_048) as store:
        put(store, range(10))
        kept = store.get_many([key(n) for n in range(10)])
        assert len(kept) == 5
        store.set_budget(20 * 20_048)
        put(store, range(10, 20))
        assert store.stats()[0].num_blocks == 15
        store.set_budget(2 * 20_048)
        put(store, [20])
        assert store.stats()[0].num_blocks == 2
        assert {number_of(each, stored) for each, stored in kept.items()} == {5, 6, 7, 8, 9}


def test_a_view_stays_as_it_was_while_its_block_is_evicted_replaced_and_erased(store: DiskStore) -> None:
    put(store, [1], "user:ann", 200_000)
    lent = store.get_many([key(1)])[key(1)]
    store.put_many({key(1): block(7, 200_000, "user:ann")})
    store.delete_owner("user:ann")
    for round_ in range(20):  # each would use the pages of the block again, if they were free
        put(store, range(round_ * 10, round_ * 10 + 10), "item:x", 200_000)
        store.delete_owner("item:x")
    assert lent.data == block(1, 200_000).data
    assert store.use().num_leases == 1
    assert lent.data.readonly


def test_a_lease_ends_with_the_last_view_of_it(store: DiskStore) -> None:
    put(store, range(3))
    found = store.get_many([key(n) for n in range(3)])
    part = memoryview(np.frombuffer(found[key(1)].data, np.uint8)[100:200])
    assert store.use().num_leases == 1
    del found
    gc.collect()
    assert store.use().num_leases == 1
    assert bytes(part) == bytes(block(1).data[100:200])
    del part
    gc.collect()
    assert store.use().num_leases == 0


def test_a_store_that_is_closed_keeps_what_is_in_use(tmp_path: Path) -> None:
    store = DiskStore.open(tmp_path, MB)
    put(store, [1])
    lent = store.get_many([key(1)])
    store.close()
    with pytest.raises(StoreError, match="already open"):
        DiskStore.open(tmp_path, MB)
    assert number_of(key(1), lent[key(1)]) == 1
    del lent
    gc.collect()
    with DiskStore.open(tmp_path, MB) as again:
        assert served(again, [1]) == {1}


def test_the_age_of_the_oldest_lease_is_known(tmp_path: Path) -> None:
    now = [100.0]
    with DiskStore.open(tmp_path, MB, clock=lambda: now[0]) as store:
        put(store, [1])
        first = store.get_many([key(1)])
        now[0] = 130.0
        second = store.get_many([key(1)])
        assert store.use().oldest_lease_s == 30.0
        del first
        assert store.use().oldest_lease_s == 0.0
        del second


def test_nothing_found_holds_no_lease(store: DiskStore) -> None:
    assert store.get_many([key(1)]) == {}
    assert store.use().num_leases == 0


def test_what_is_put_is_copied(store: DiskStore) -> None:
    data = bytearray(block(1).data)
    store.put_many({key(1): Stored(memoryview(data), 1.0, None)})
    data[:] = bytes(len(data))
    assert served(store, [1]) == {1}


def test_closing_twice_closes_nothing_of_others(tmp_path: Path) -> None:
    """A regression: the second time closed a descriptor that might be somebody else's by then."""
    disk = DiskStore.open(tmp_path / "store", 1 << 24)
    disk.close()
    with open(tmp_path / "other", "wb") as other:
        disk.close()
        other.write(b"still open")
    assert (tmp_path / "other").read_bytes() == b"still open"
