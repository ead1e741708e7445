"""What waits to be written: its bound, its order, and who waits for whom."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from rcllm.core.ranking import ContentKey
from rcllm.store import behind
from rcllm.store.behind import Batch, Waiting, WriteBehind
from rcllm.store.contract import Stored
from tests.contracts.keepers import BLOCK_BYTES, block, key, version_of


def anew(number: int, version: int = 0, owner: str | None = None) -> Waiting:
    return Waiting(block(number, owner, version), 2, anew=True)


def copy(number: int, version: int = 0) -> Waiting:
    return Waiting(block(number, None, version), 1, anew=False)


class Written:
    """Takes batches when it is let, and remembers them."""

    def __init__(self) -> None:
        self.batches: list[dict[ContentKey, Waiting]] = []
        self.begun = threading.Semaphore(0)
        self.allowed = threading.Semaphore(0)

    def __call__(self, batch: Batch) -> None:
        self.begun.release()
        assert self.allowed.acquire(timeout=20)
        self.batches.append(dict(batch))

    def let(self, count: int = 1000) -> None:
        self.allowed.release(count)


@pytest.fixture
def written() -> Written:
    return Written()


@pytest.fixture
def queue(written: Written) -> Iterator[WriteBehind]:
    """Room for four blocks; block 0 is being written already."""
    made = WriteBehind(written, 4 * BLOCK_BYTES)
    made.add_many({key(0): anew(0)})
    assert written.begun.acquire(timeout=20)
    yield made
    made.check()
    written.let()
    made.close()
    made.check()
    assert made.num_bytes == 0


def test_what_is_being_written_counts_and_can_be_read(queue: WriteBehind) -> None:
    assert queue.num_bytes == BLOCK_BYTES
    assert queue.get_many([key(0), key(1)]).keys() == {key(0)}


def test_what_there_is_no_room_for_is_dropped_for_each_tier_that_it_was_for(queue: WriteBehind) -> None:
    queue.add_many({key(n): anew(n) for n in range(1, 4)})
    queue.add_many({key(4): anew(4), key(5): copy(5)})
    assert queue.get_many(map(key, range(6))).keys() == set(map(key, range(4)))
    assert [queue.dropped(tier) for tier in range(3)] == [2, 1, 0]


def test_what_is_put_anew_takes_the_place_of_what_waits_and_a_copy_does_not(queue: WriteBehind) -> None:
    queue.add_many({key(1): copy(1, version=1)})
    queue.add_many({key(1): anew(1, version=2)})
    queue.add_many({key(1): copy(1, version=3), key(0): copy(0, version=3)})
    assert {version_of(n, queue.get_many([key(n)])[key(n)]) for n in (0, 1)} == {0, 2}
    queue.add_many({key(0): anew(0, version=4)})
    assert version_of(0, queue.get_many([key(0)])[key(0)]) == 4, "of what waits and what is written, what waits"
    assert queue.num_bytes == 3 * BLOCK_BYTES


def test_an_older_block_goes_also_where_there_is_no_room_for_the_newer(queue: WriteBehind) -> None:
    queue.add_many({key(n): anew(n) for n in (1, 2, 3)})
    double = Stored(memoryview(bytes(2 * BLOCK_BYTES)), 1.0, None)
    queue.add_many({key(1): Waiting(double, 2, anew=True)})
    assert key(1) not in queue.get_many([key(1)])


def test_batches_are_of_the_oldest_and_bounded(written: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(behind, "BATCH_BYTES", 2 * BLOCK_BYTES)
    queue = WriteBehind(written, 100 * BLOCK_BYTES)
    with queue.between_batches():
        queue.add_many({key(n): anew(n) for n in range(5)})
    written.let()
    queue.flush()
    assert [sorted(batch) for batch in written.batches] == [[key(0), key(1)], [key(2), key(3)], [key(4)]]
    queue.close()


def test_an_owner_is_removed_from_what_waits(queue: WriteBehind) -> None:
    queue.add_many({key(1): anew(1, owner="ann"), key(2): anew(2, owner="bob")})
    assert queue.forget(["ann"]) == 1
    assert queue.get_many([key(1), key(2)]).keys() == {key(2)}
    assert queue.forget(["ann"]) == 0


def test_between_batches_nothing_is_written(queue: WriteBehind, written: Written) -> None:
    written.let(1)
    with queue.between_batches():
        assert len(written.batches) == 1
        queue.add_many({key(1): anew(1)})
        written.let()
        assert not written.begun.acquire(timeout=0.1)
    queue.flush()
    assert [sorted(batch) for batch in written.batches] == [[key(0)], [key(1)]]


def test_close_writes_what_waits(written: Written) -> None:
    queue = WriteBehind(written, 100 * BLOCK_BYTES)
    written.let()
    queue.add_many({key(n): anew(n) for n in range(50)})
    queue.close()
    assert {number for batch in written.batches for number in batch} == {key(n) for n in range(50)}
    queue.close()
