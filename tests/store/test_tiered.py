"""Tiers above each other: what goes where, what is never waited for, and what must not come back."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import pytest

from rcllm.core.ranking import ContentKey
from rcllm.errors import ErasureError, StoreWarning
from rcllm.store.contract import Stored
from rcllm.store.memory import MemoryStore
from rcllm.store.owners import one_name
from rcllm.store.tiered import Tiered
from tests.contracts.keepers import BLOCK_BYTES, block, key, version_of

ROOT = Path(__file__).resolve().parents[2]


class Tier(MemoryStore):
    """A lasting tier that tells what it was given, and lets something happen within its calls."""

    def __init__(self, num_blocks: int = 100) -> None:
        super().__init__(num_blocks * BLOCK_BYTES)
        self.given: list[ContentKey] = []
        self.within_get: Callable[[], object] = lambda: None
        self.within_put: Callable[[], object] = lambda: None
        self.closed = False

    def get_many(self, keys: Iterable[ContentKey]) -> Mapping[ContentKey, Stored]:
        found = super().get_many(keys)
        self.within_get()
        return found

    def put_many(self, blocks: Mapping[ContentKey, Stored]) -> None:
        self.within_put()
        self.given += blocks
        super().put_many(blocks)

    def close(self) -> None:
        self.closed = True

    def has(self, *numbers: int) -> set[int]:
        return {n for n in numbers if key(n) in super(Tier, self).lookup_many([key(n)])}


class Broken(Tier):
    def delete_owner(self, owner: str) -> int:
        raise OSError("no such device")

    def get_many(self, keys: Iterable[ContentKey]) -> Mapping[ContentKey, Stored]:
        raise OSError("no such device")


def fail() -> None:
    raise OSError("no such device")


def put(store: Tiered | Tier, *numbers: int, owner: str | None = None, version: int = 0) -> None:
    store.put_many({key(n): block(n, one_name(owner), version) for n in numbers})


def versions(store: Tiered | Tier, *numbers: int) -> dict[int, int | None]:
    found = store.get_many([key(n) for n in numbers])
    return {n: version_of(n, found[key(n)]) for n in numbers if key(n) in found}


@pytest.fixture
def disk() -> Tier:
    return Tier()


@pytest.fixture
def shared() -> Tier:
    return Tier()


@pytest.fixture
def tiered(disk: Tier, shared: Tier) -> Iterator[Tiered]:
    """Three blocks of memory over two lasting tiers."""
    made = Tiered({"disk": disk, "shared": shared}, memory_bytes=3 * BLOCK_BYTES, queue_bytes=10 * BLOCK_BYTES)
    yield made
    made.flush()
    made.check()
    made.close()


# ---- what goes where ----


def test_what_is_put_comes_to_every_tier(tiered: Tiered, disk: Tier, shared: Tier) -> None:
    put(tiered, 1, 2)
    tiered.flush()
    assert disk.has(1, 2) == shared.has(1, 2) == {1, 2}
    host, *lasting = tiered.stats()
    assert (host.tier, host.num_blocks) == ("host", 2)
    assert [tier.num_blocks for tier in lasting] == [2, 2]


def test_what_is_found_far_away_is_copied_nearer(tiered: Tiered, disk: Tier, shared: Tier) -> None:
    put(shared, 1, 2)
    put(disk, 3)
    assert versions(tiered, 1, 2, 3, 4) == {1: 0, 2: 0, 3: 0}
    tiered.flush()
    assert disk.has(1, 2, 3) == {1, 2, 3}
    assert shared.has(1, 2, 3) == {1, 2}, "nothing is copied farther away by a read"
    assert {found.tier for found in tiered.lookup_many([key(1), key(2), key(3)]).values()} == {"host"}
    host, first, second = tiered.stats()
    assert [(tier.hits, tier.promoted) for tier in (host, first, second)] == [(0, 0), (1, 1), (2, 2)]
    versions(tiered, 1, 2, 3)
    assert tiered.stats()[0].hits == 3


def test_without_memory_the_nearest_tier_is_read_in_place(disk: Tier) -> None:
    tiered = Tiered({"disk": disk}, queue_bytes=10 * BLOCK_BYTES)
    put(disk, 1)
    lent = Stored(memoryview(array("B", block(1).data)), 2.0, None, "space 1")
    disk._blocks[key(1)] = lent
    assert tiered.get_many([key(1)])[key(1)] is lent
    assert tiered.stats()[0].promoted == 0
    tiered.close()


def test_what_memory_evicts_goes_to_the_next_tier_unless_that_has_it(tiered: Tiered, disk: Tier, shared: Tier) -> None:
    put(tiered, 1, 2, 3)
    tiered.flush()
    put(disk, 1, owner="lost")
    disk.delete_owner(one_name("lost") or "")  # gives it up, as an eviction does
    disk.given = []
    put(tiered, 4, 5, 6)
    tiered.flush()
    assert disk.has(1, 2, 3, 4, 5, 6) == {1, 2, 3, 4, 5, 6}
    assert sorted(disk.given) == sorted(map(key, (1, 4, 5, 6)))
    assert shared.given.count(key(1)) == 1, "demotion goes to the next tier alone"


def test_what_is_found_is_what_was_put_last_wherever_it_is(tiered: Tiered, disk: Tier, shared: Tier) -> None:
    put(disk, 1, version=1)
    put(shared, 1, version=1)
    put(tiered, 1, version=2)
    assert versions(tiered, 1) == {1: 2}
    put(tiered, 2, 3, 4)
    assert versions(tiered, 1) == {1: 2}, "from the queue or a lasting tier, for memory gave it up"
    tiered.flush()
    assert versions(disk, 1) == versions(shared, 1) == {1: 2}


# ---- writing behind ----


def test_nobody_waits_for_a_slow_tier_and_what_is_dropped_is_counted(tiered: Tiered, disk: Tier) -> None:
    writes, goes_on = threading.Event(), threading.Event()

    def stall() -> None:
        writes.set()
        assert goes_on.wait(20)

    disk.within_put = stall
    put(tiered, 0)
    assert writes.wait(20)
    put(tiered, *range(1, 15))
    assert versions(tiered, *range(15)).keys() == {*range(10), 12, 13, 14}, "queue of ten, memory of three"
    assert tiered.stats()[0].evictions == 12
    disk.within_put = lambda: None
    goes_on.set()
    tiered.flush()
    assert disk.has(*range(15)) == set(range(10))
    # five of them were put, and two evicted by memory later on, when the queue was full as well
    assert [tier.dropped for tier in tiered.stats()] == [0, 7, 5]
    assert all(tier.waiting_bytes == 0 for tier in tiered.stats())


def test_the_writer_starts_with_the_first_block_and_ends_with_close(disk: Tier) -> None:
    before = set(threading.enumerate())
    tiered = Tiered({"disk": disk}, queue_bytes=10 * BLOCK_BYTES)
    versions(tiered, 1)
    tiered.delete_owner("ann")
    tiered.flush()
    assert set(threading.enumerate()) == before
    put(tiered, 1)
    tiered.close()
    assert set(threading.enumerate()) == before
    assert disk.has(1) == {1}
    assert disk.closed
    tiered.close()  # twice is as good as once


def test_closing_closes_every_tier_also_where_one_fails(disk: Tier) -> None:
    class Stuck(Tier):
        def close(self) -> None:
            raise OSError("cannot be closed")

    tiered = Tiered({"disk": disk, "shared": Stuck()}, queue_bytes=10 * BLOCK_BYTES)
    with pytest.raises(OSError, match="cannot be closed"):
        tiered.close()
    assert disk.closed


@pytest.mark.parametrize("cyclic", [False, True])
def test_what_was_accepted_is_written_when_nobody_refers_to_it_any_more(cyclic: bool, disk: Tier) -> None:
    tiered = Tiered({"disk": disk}, queue_bytes=100 * BLOCK_BYTES)
    put(tiered, *range(50))
    if cyclic:
        tiered.itself = tiered  # type: ignore[attr-defined]
    del tiered
    gc.collect()
    assert disk.has(*range(50)) == set(range(50))
    assert disk.closed


def test_what_was_accepted_is_written_when_the_interpreter_ends() -> None:
    script = """
import time
from tests.contracts.keepers import BLOCK_BYTES, block, key
from rcllm.store.memory import MemoryStore
from rcllm.store.tiered import Tiered
class Slow(MemoryStore):
    def put_many(self, blocks):
        time.sleep(0.2)
        super().put_many(blocks)
    def close(self):
        print(self.stats()[0].num_blocks, flush=True)
tiered = Tiered({"disk": Slow(1000 * BLOCK_BYTES)}, queue_bytes=1000 * BLOCK_BYTES)
for n in range(100):
    tiered.put_many({key(n): block(n)})
"""
    ended = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "100\n", "")


# ---- what must not come back ----


def test_an_owner_that_is_erased_while_its_block_is_read_does_not_come_back(
    tiered: Tiered, disk: Tier, shared: Tier
) -> None:
    put(shared, 1, 2, owner="ann")
    shared.within_get = lambda: tiered.delete_owner("ann")
    assert versions(tiered, 1, 2) == {}
    tiered.flush()
    assert disk.has(1, 2) == shared.has(1, 2) == set()
    assert tiered.lookup_many([key(1), key(2)]) == {}


def test_a_read_that_begins_while_its_owner_is_erased_brings_nothing_back(
    tiered: Tiered, shared: Tier, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(shared, 1, owner="ann")
    real = shared.delete_owner
    seen: list[dict[int, int | None]] = []

    def read_and_erase(owner: str) -> int:
        seen.append(versions(tiered, 1))
        return real(owner)

    monkeypatch.setattr(shared, "delete_owner", read_and_erase)
    assert tiered.delete_owner("ann") == 1
    assert seen == [{}]
    assert versions(tiered, 1) == {}


def test_a_block_that_is_replaced_while_it_is_read_stays_replaced(tiered: Tiered, disk: Tier, shared: Tier) -> None:
    put(shared, 1, version=1)

    def replace_it() -> None:
        shared.within_get = lambda: None
        put(tiered, 1, version=2)
        put(tiered, 2, 3, 4)  # memory gives it up
        tiered.flush()

    shared.within_get = replace_it
    versions(tiered, 1)
    assert versions(tiered, 1) == {1: 2}
    tiered.flush()
    assert versions(disk, 1) == {1: 2}


def test_whom_another_process_erased_memory_and_queue_do_not_bring_back(
    tiered: Tiered, disk: Tier, shared: Tier
) -> None:
    """A regression: what memory had was read on, and written to the disk once it made way."""
    ann = one_name("ann") or ""
    put(tiered, 1, owner="ann")
    put(tiered, 2, owner="bob")
    tiered.flush()
    assert [tier.delete_owner(ann) for tier in (disk, shared)] == [1, 1]
    with tiered._behind.between_batches():
        put(tiered, 3, owner="ann")
        assert tiered.forget([ann]) == 2
    put(tiered, 4, 5, 6)
    tiered.flush()
    assert versions(tiered, 1, 2, 3) == {2: 0}
    assert disk.has(1, 3) == shared.has(1, 3) == set()


def test_what_is_read_while_everybody_is_forgotten_comes_no_nearer(tiered: Tiered, shared: Tier) -> None:
    put(shared, 1, owner="ann")
    put(shared, 2)
    shared.within_get = lambda: tiered.forget(None)
    assert versions(tiered, 1, 2) == {2: 0}
    assert tiered.stats()[0].num_blocks == 1


def test_erasing_waits_for_what_is_being_written(tiered: Tiered, disk: Tier, shared: Tier) -> None:
    writes, goes_on = threading.Event(), threading.Event()

    def stall() -> None:
        writes.set()
        assert goes_on.wait(20)

    disk.within_put = stall
    put(tiered, 1, owner="ann")
    assert writes.wait(20)
    put(tiered, 2, owner="ann")
    put(tiered, 3, owner="bob")
    erasing = threading.Thread(target=tiered.delete_owner, args=["ann"])
    erasing.start()
    erasing.join(0.1)
    assert erasing.is_alive()
    disk.within_put = lambda: None
    goes_on.set()
    erasing.join(20)
    assert versions(tiered, 1, 2, 3) == {3: 0}
    tiered.flush()
    assert disk.has(1, 2, 3) == shared.has(1, 2, 3) == {3}


def test_erasing_is_not_kept_waiting_by_a_writer_that_is_never_idle(tiered: Tiered, disk: Tier) -> None:
    stop = threading.Event()

    def keep_writing() -> None:
        while not stop.is_set():
            put(tiered, *range(10), owner="bob")

    busy = threading.Thread(target=keep_writing)
    busy.start()
    try:
        for n in range(20, 40):
            put(tiered, n, owner="ann")
            tiered.delete_owner("ann")
            assert versions(tiered, n) == {}
    finally:
        stop.set()
        busy.join()


def test_erasing_tries_every_tier_and_says_which_failed(disk: Tier) -> None:
    tiered = Tiered({"disk": Broken(), "shared": disk}, memory_bytes=10 * BLOCK_BYTES, queue_bytes=10 * BLOCK_BYTES)
    put(tiered, 1, owner="ann")
    tiered.flush()
    with (
        pytest.warns(StoreWarning, match=r"disk tier of the store failed \(OSError: no such device\)"),
        pytest.raises(ErasureError, match=r"'ann' may be left.*disk \(OSError: no such device\).*erase again"),
    ):
        tiered.delete_owner("ann")
    assert disk.has(1) == set()
    tiered.close()


# ---- a tier that fails ----


def test_a_tier_that_fails_is_a_tier_that_has_nothing(disk: Tier) -> None:
    tiered = Tiered({"disk": Broken(), "shared": disk}, queue_bytes=10 * BLOCK_BYTES)
    put(disk, 1)
    assert versions(tiered, 1) == {1: 0}
    assert tiered.stats()[0].errors == 1
    tiered.close()
