"""Host memory of one piece: bytes stay whoever has them, and come back when nobody does."""

from __future__ import annotations

import gc
import threading
import weakref

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rcllm.store.arena import Arena
from rcllm.store.contract import Stored
from rcllm.store.memory import MemoryStore
from tests.contracts.keepers import BLOCK_BYTES, block, key, version_of

PAGE = 32


def arena(pages: int) -> Arena:
    return Arena(np.zeros(pages * PAGE, np.uint8), PAGE)


@given(steps=st.lists(st.tuples(st.sampled_from(["take", "drop", "view"]), st.integers(1, 200)), max_size=60))
@settings(max_examples=60, deadline=None)
def test_bytes_are_lent_to_one_at_a_time(steps: list[tuple[str, int]]) -> None:
    made, lent = arena(20), list[tuple[memoryview, int]]()
    for number, (step, size) in enumerate(steps):
        if step == "take":
            lent += filled(made.take(size), number)
        elif lent:
            data, value = lent.pop(size % len(lent))
            if step == "view":  # part of the bytes keeps all of them
                lent.append((data[: -(-len(data) // 2)], value))
            del data
        assert all(bytes(data) == bytes([value]) * len(data) for data, value in lent)
        made.check(data for data, _ in lent)


def filled(data: memoryview | None, number: int) -> list[tuple[memoryview, int]]:
    if data is None:
        return []
    data[:] = bytes([number]) * len(data)
    return [(data, number)]


def test_a_run_is_free_again_when_nobody_has_its_bytes() -> None:
    made = arena(4)
    first = made.take(4 * PAGE)
    assert first is not None
    array = np.frombuffer(first[PAGE:], np.uint8)
    del first
    assert made.take(1) is None
    del array
    assert made.take(4 * PAGE) is not None


def test_bytes_may_end_in_any_thread_and_while_bytes_are_taken() -> None:
    made = arena(64)

    def take() -> None:
        for number in range(300):
            data = made.take(1 + number % 70)
            del data

    lock = threading.Lock()

    def locked() -> None:
        for _ in range(300):
            with lock:
                held = made.take(PAGE)
            del held  # without the lock

    take()
    threads = [threading.Thread(target=locked) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    gc.collect()
    made.check([])


def test_an_arena_ends_with_its_bytes_and_not_before() -> None:
    made = arena(2)
    memory, data = weakref.ref(made._memory), made.take(PAGE)
    assert data is not None
    data[:] = b"x" * PAGE
    del made
    gc.collect()
    assert memory() is not None
    assert bytes(data) == b"x" * PAGE
    del data
    gc.collect()
    assert memory() is None


# ---- as a tier -------------------------------------------------------------------------------------------------------


def store(num_blocks: int) -> MemoryStore:
    return MemoryStore.within(arena(num_blocks * BLOCK_BYTES // PAGE))


def test_what_is_read_stays_while_it_makes_way() -> None:
    memory = store(8)  # of which seven are the budget
    memory.put_many({key(1): block(1)})
    [read] = memory.get_many([key(1)]).values()
    memory.put_many({key(n): block(n) for n in range(2, 30)})
    assert key(1) not in memory.lookup_many([key(1)])
    assert version_of(1, read) == 0
    memory.check()


def test_what_lies_in_the_arena_already_is_not_copied() -> None:
    memory = store(8)
    room = memory.room_for(BLOCK_BYTES)
    assert room is not None
    room[:] = block(3).data
    memory.put_many({key(3): Stored(room, 4.0, None, "space 1")})
    [kept] = memory.get_many([key(3)]).values()
    assert kept.data.obj is room.obj
    assert version_of(3, kept) == 0


def test_bytes_of_another_arena_are_copied() -> None:
    memory, room = store(8), arena(20).take(BLOCK_BYTES)
    assert room is not None
    room[:] = block(3).data
    memory.put_many({key(3): Stored(room, 4.0, None, "space 1")})
    [kept] = memory.get_many([key(3)]).values()
    assert kept.data.obj is not room.obj
    memory.check()


@pytest.mark.parametrize("held", [False, True])
def test_a_block_that_finds_no_run_makes_some_others_go_or_is_dropped(held: bool) -> None:
    """Without the slack: every run is one block's, and the large block needs two beside each other."""
    memory = MemoryStore(100 * BLOCK_BYTES, arena(6 * BLOCK_BYTES // PAGE))
    memory.put_many({key(n): block(n) for n in range(6)})
    readers = memory.get_many([key(n) for n in range(6)]) if held else {}
    double = Stored(memoryview(bytes(2 * BLOCK_BYTES)), 1.0, None)
    memory.put_many({key(9): double})
    assert (key(9) in memory.lookup_many([key(9)])) == (not held)
    [stats] = memory.stats()
    assert stats.dropped == held
    assert stats.evictions <= 8
    assert all(version_of(key_[-1], each) == 0 for key_, each in readers.items())
    memory.check()
