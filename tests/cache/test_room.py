"""The pool's memory in pages: nothing overlaps, nothing is lost, and contents stay what they are."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rcllm.cache.pool import Pool
from rcllm.cache.room import Paged
from rcllm.model.kv_int8 import fill, kept, widen
from rcllm.store.codec import decode
from rcllm.store.memory import MemoryStore
from tests.cache.test_pool import key, kv

CPU = torch.device("cpu")
PAGE = 64  # bytes: two tokens of `kv`
DTYPES = (torch.float32, torch.bfloat16, torch.int8)


def room(pages: int) -> Paged:
    return Paged(pages * PAGE, torch.float32, CPU, PAGE)


def put(paged: Paged, block: torch.Tensor) -> torch.Tensor | None:
    to = paged.take(block)
    return to if to is None else fill(to, block)


@given(steps=st.lists(st.tuples(st.booleans(), st.integers(0, 30), st.integers(1, 7)), max_size=40))
@settings(max_examples=60, deadline=None)
def test_blocks_come_and_go_and_stay_what_they_are(steps: list[tuple[bool, int, int]]) -> None:
    paged, there = room(20), dict[int, torch.Tensor]()
    for number, (frees, which, size) in enumerate(steps):
        if frees and there:
            paged.free(there.pop(sorted(there)[which % len(there)]))
        elif (placed := put(paged, kv(number, size))) is not None:
            there[number] = placed
        if which % 5 == 0:
            movable = {each: block for each, block in there.items() if (each + which) % 3}
            there |= paged.compacted(movable)
        paged.check(there.values())
        assert all(torch.equal(block, kv(each, block.shape[3])) for each, block in there.items())


def test_after_compaction_all_that_is_free_is_one_run() -> None:
    paged = room(8)
    blocks = [put(paged, kv(number, 4)) for number in range(4)]
    for number in (0, 2):
        paged.free(blocks[number])  # type: ignore[arg-type]
    assert put(paged, kv(9, 8)) is None, "four pages are free, but not beside each other"
    moved = paged.compacted({number: blocks[number] for number in (1, 3)})  # type: ignore[misc]
    assert set(moved) == {1, 3}
    assert put(paged, kv(9, 8)) is not None


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_is_kept_as_without_pages(dtype: torch.dtype) -> None:
    block = torch.randn(2, 2, 1, 5, 32)
    placed = put(Paged(1 << 20, dtype, CPU, 4096), block)
    assert placed is not None
    assert torch.equal(widen(placed).float(), widen(kept(block, dtype, CPU)).float())
    assert placed.data_ptr() % 16 == 0
    assert placed.is_contiguous()


def test_a_block_that_no_run_fits_lies_beside() -> None:
    """Held blocks may not be moved, and may lie so that nothing else fits between them: still no request fails."""
    pool = Pool(8 * PAGE, torch.float32, CPU, page_bytes=PAGE)
    with pool.hold() as fragments, pool.hold() as others:
        for number in range(4):
            holder = fragments if number % 2 else others
            holder.publish(key(number), kv(number, 4), 1.0, None)
        others.release()
        with pool.hold() as wide:
            wide.publish(key(9), kv(9, 8), 1.0, None)
            assert torch.equal(wide.blocks[key(9)], kv(9, 8))
            assert all(torch.equal(fragments.blocks[key(number)], kv(number, 4)) for number in (1, 3))
            pool.check()


def test_what_is_evicted_before_it_was_handed_down_is_handed_down() -> None:
    store = MemoryStore(1 << 20)
    pool = Pool(4 * PAGE, torch.float32, CPU, store, page_bytes=PAGE)
    for number in range(3):  # each takes all pages
        with pool.hold() as held:
            held.publish(key(number), kv(number, 8), 1.0, None)
    pool.write_through()
    found = store.get_many([key(number) for number in range(3)])
    assert [torch.equal(decode(found[key(n)].data), kv(n, 8)) for n in range(3)] == [True] * 3
