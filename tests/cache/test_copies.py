"""Copies beside what is computed: what is read, freed, moved, erased or handed down while they are under way.

The lanes are lazy: nothing has been copied before it was waited for, so that a wait that is missing is seen.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from rcllm.cache.held import Blocks
from rcllm.cache.leaving import Leaving
from rcllm.cache.pool import Pool
from rcllm.core.ranking import ContentKey
from rcllm.model.arrivals import Arrivals, Arriving
from rcllm.store.arena import Arena
from rcllm.store.codec import decode, encode
from rcllm.store.contract import Stored
from rcllm.store.memory import MemoryStore
from tests.cache.lazily import Lazily, lazy_lanes
from tests.cache.test_pool import CPU, TOKEN_BYTES, key, kv

PAGES = 8  # of a token each
BLOCK_BYTES = len(encode(kv(0, 8)))


class Case:
    """A pool of eight pages of a token each, over a store that has blocks 0 to 9, each of four tokens."""

    def __init__(self, pages: int = PAGES) -> None:
        self.store = MemoryStore.within(Arena(np.zeros(40 * BLOCK_BYTES, np.uint8), page_bytes=64))
        self.store.put_many({key(n): Stored(encode(kv(n, 4)), 1.0, f"owner {n}") for n in range(10)})
        lanes = lazy_lanes()
        assert isinstance(lanes.up, Lazily)
        assert isinstance(lanes.down, Lazily)
        self.up, self.down = lanes.up, lanes.down
        self.pool = Pool(pages * TOKEN_BYTES, torch.float32, CPU, self.store, page_bytes=TOKEN_BYTES, lanes=lanes)

    def fetch(self, *numbers: int) -> None:
        """Brings blocks up; nobody holds or reads them."""
        with self.pool.hold() as held:
            assert held.fetch(map(key, numbers)) == []

    def publish(self, number: int, size: int = 4, owner: str | None = None) -> None:
        with self.pool.hold() as held:
            held.publish(key(number), kv(number, size), 1.0, owner)

    def holds(self, *numbers: int, size: int = 4) -> bool:
        """Whether these blocks are on the device, and right."""
        with self.pool.hold() as held:
            assert held.fetch(map(key, numbers)) == []
            assert set(held.sources.values()) == {"device"}
            return all(torch.equal(held.blocks[key(n)], kv(n, size)) for n in numbers)

    def has_below(self, number: int, size: int) -> bool:
        found = self.store.get_many([key(number)])
        return key(number) in found and torch.equal(decode(found[key(number)].data, checked=True), kv(number, size))


# ---- what is read ----------------------------------------------------------------------------------------------------


def test_what_is_looked_up_is_waited_for_and_the_rest_is_not() -> None:
    case = Case()
    with case.pool.hold() as held:
        held.fetch([key(1)])
        held.fetch([key(2)])
        assert case.up.num_left == 4, "two parts each"
        assert torch.equal(held.blocks[key(1)], kv(1, 4))
        assert case.up.num_left == 2
        assert torch.equal(held.blocks[key(2)], kv(2, 4))


def test_a_pass_waits_for_each_part_before_the_layer_that_reads_it() -> None:
    case = Case()
    with case.pool.hold() as held:
        held.fetch([key(1), key(2)])
        early = held.blocks.early([key(1), key(2), key(1)])
        [arrivals] = early.arrivals
        assert arrivals.starts == {0, 1}
        for layer in range(2):
            arrivals.wait(layer)
            for number in (1, 2):
                assert torch.equal(early.kv[key(number)][: layer + 1], kv(number, 4)[: layer + 1])
            assert arrivals.starts == ({1} if layer == 0 else set())
        assert held.blocks.early([key(1)]).arrivals, "the device may not have come so far"
    with case.pool.hold() as held:
        held.fetch([key(1), key(2)])
        assert held.blocks.early([key(1), key(2)]).arrivals == (), "what has long arrived costs nothing"


def test_whoever_finds_a_block_on_the_device_that_is_still_arriving_waits_as_well() -> None:
    case = Case()
    with case.pool.hold() as first, case.pool.hold() as second:
        first.fetch([key(1)])
        second.fetch([key(1)])
        assert second.sources == {key(1): "device"}
        longer = second.also([key(1)])
        assert torch.equal(longer.blocks[key(1)], kv(1, 4))
        longer.release()
    case.pool.check()


def test_blocks_for_other_processes_are_waited_for() -> None:
    case = Case()
    case.fetch(3)
    [stored] = case.pool.sealed([key(3)]).values()
    assert torch.equal(decode(stored.data), kv(3, 4))


# ---- memory that is used anew ----------------------------------------------------------------------------------------


def evicted_while_it_arrives(case: Case) -> bool:
    case.fetch(1, 2)
    case.publish(20, size=8)  # in the place of both
    case.up.run(100)
    return case.holds(20, size=8)


def erased_while_it_arrives(case: Case) -> bool:
    case.fetch(1, 2)
    for number in (1, 2):
        case.pool.delete_owner(f"owner {number}")
    case.publish(20, size=8)
    case.up.run(100)
    return case.holds(20, size=8)


def moved_while_it_arrives(case: Case) -> bool:
    case.publish(20, size=1, owner="short")
    case.fetch(1)
    case.publish(22, size=1, owner="short")
    case.pool.delete_owner("short")
    case.publish(23, size=4)  # all that is free, which has to be moved together
    case.up.run(100)
    return case.holds(1) and case.holds(23)


def evicted_before_it_is_handed_down(case: Case) -> bool:
    case.publish(20, size=8)
    case.publish(21, size=8)
    case.pool.settle()
    return case.has_below(20, 8) and case.has_below(21, 8)


def evicted_while_it_is_copied_down(case: Case) -> bool:
    case.publish(20, size=8)
    case.pool.write_through()
    case.publish(21, size=8)
    case.pool.settle()
    return case.has_below(20, 8)


def moved_while_it_is_copied_down(case: Case) -> bool:
    case.publish(20, size=1, owner="short")
    case.publish(21, size=3)
    case.publish(22, size=1, owner="short")
    case.pool.write_through()
    case.pool.delete_owner("short")
    case.publish(23, size=5)  # all that is free, which has to be moved together
    case.pool.settle()
    return case.has_below(21, 3) and case.holds(21, size=3) and case.holds(23, size=5)


def moved_before_it_is_handed_down(case: Case) -> bool:
    case.publish(20, size=1, owner="short")
    case.publish(21, size=3)
    case.publish(22, size=1, owner="short")
    case.pool.delete_owner("short")
    case.publish(23, size=5)
    case.pool.settle()
    return case.has_below(21, 3) and case.holds(21, size=3) and case.holds(23, size=5)


def released_after_it_was_cleared(case: Case) -> bool:
    """Published, and taken out while it is held: its pages are used anew before it was handed down."""
    with case.pool.hold() as held:
        held.publish(key(20), kv(20, 8), 1.0, None)
        case.pool.clear()
    case.publish(21, size=8)
    case.pool.settle()
    return case.has_below(20, 8)


def handed_down_early(case: Case) -> bool:
    case.publish(20, size=8)
    case.pool.write_through()
    case.pool.write_through()
    assert case.down.num_left == 1, "nobody has waited for it"
    if key(20) in case.store.lookup_many([key(20)]):
        return False
    case.pool.settle()
    return case.has_below(20, 8)


def its_bytes_make_way_while_it_arrives(case: Case) -> bool:
    """The arena's bytes of a block that is being copied are nobody else's, whatever is put meanwhile."""
    case.fetch(1)
    case.store.put_many({key(n): Stored(encode(kv(n, 8)), 1e9, None) for n in range(30, 100)})
    assert key(1) not in case.store.lookup_many([key(1)])
    return case.holds(1)


CASES: tuple[Callable[[Case], bool], ...] = (
    evicted_while_it_arrives,
    erased_while_it_arrives,
    moved_while_it_arrives,
    evicted_before_it_is_handed_down,
    evicted_while_it_is_copied_down,
    moved_while_it_is_copied_down,
    moved_before_it_is_handed_down,
    released_after_it_was_cleared,
    handed_down_early,
    its_bytes_make_way_while_it_arrives,
)


@pytest.mark.parametrize("outcome", CASES)
def test_memory_is_used_anew_after_all_copies_from_and_to_it(outcome: Callable[[Case], bool]) -> None:
    case = Case()
    assert outcome(case)
    case.pool.check()
    case.store.check()
    assert not case.pool._index._pins


MISSING: tuple[tuple[type, str, tuple[Callable[[Case], bool], ...]], ...] = (
    (Arriving, "wait", (evicted_while_it_arrives, erased_while_it_arrives, moved_while_it_arrives)),
    (Leaving, "wait", (evicted_while_it_is_copied_down, moved_while_it_is_copied_down)),
    (Leaving, "gone", (evicted_before_it_is_handed_down, released_after_it_was_cleared)),
    (Leaving, "moved", (moved_before_it_is_handed_down,)),
)


@pytest.mark.parametrize(
    ("where", "name", "outcome"), [(where, name, each) for where, name, outcomes in MISSING for each in outcomes]
)
def test_a_wait_that_is_missing_is_seen(
    where: type, name: str, outcome: Callable[[Case], bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tests above can fail."""
    monkeypatch.setattr(where, name, lambda *given: None)
    assert not outcome(Case())


def test_a_copy_that_is_thought_over_too_early_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rcllm.cache.leaving._Copied.is_over", True)
    assert not handed_down_early(Case())


# ---- erasing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["waiting", "being copied", "copied", "being handed down"])
def test_nothing_of_an_owner_comes_down_after_it_was_erased(when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case()
    case.publish(20, owner="ann")
    if when != "waiting":
        case.pool.write_through()
    if when in ("copied", "being handed down"):
        case.down.run(100)
    if when == "being handed down":
        put = case.store.put_many

        def erasing(blocks: dict[ContentKey, Stored]) -> None:
            case.pool.delete_owner("ann")
            put(blocks)

        monkeypatch.setattr(case.store, "put_many", erasing)
    else:
        case.pool.delete_owner("ann")
    case.pool.settle()
    assert key(20) not in case.pool.lookup_many([key(20)])
    case.pool.check()


def test_a_block_that_is_erased_while_it_is_read_from_the_store_is_not_brought_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = Case()
    get = case.store.get_many

    def erased_meanwhile(keys: list[ContentKey]) -> object:
        found = get(keys)
        case.pool.delete_owner("owner 1")
        return found

    monkeypatch.setattr(case.store, "get_many", erased_meanwhile)
    with case.pool.hold() as held:
        assert held.fetch([key(1), key(2)]) == [key(1)]
        assert torch.equal(held.blocks[key(2)], kv(2, 4))
    case.pool.check()


# ---- copies that cannot be begun -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("refuses", "missing"), [(1, {1}), (2, {1, 2})])
def test_what_there_is_no_memory_to_copy_from_is_a_miss_that_is_counted(refuses: int, missing: set[int]) -> None:
    case = Case()
    case.up.refuses = refuses
    with case.pool.hold() as held:
        assert set(held.fetch(map(key, (1, 2)))) == set(map(key, missing))
        for number in {1, 2} - missing:
            assert torch.equal(held.blocks[key(number)], kv(number, 4))
    assert case.pool.stats().store_errors == refuses
    assert case.pool.stats().misses == len(missing)
    case.pool.check()


def test_copies_up_that_cannot_be_begun_are_misses_that_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case()
    case.fetch(1)
    monkeypatch.setattr(case.up, "send", refuse)
    with case.pool.hold() as held:
        assert held.fetch(map(key, (1, 2))) == [key(2)]
        assert torch.equal(held.blocks[key(1)], kv(1, 4))
        held.publish(key(2), kv(2, 4), 1.0, "owner 2")
    assert case.pool.stats().store_errors == 1
    case.pool.check()
    assert not case.pool._index._pins


@pytest.mark.parametrize("evicted", [False, True])
def test_copies_down_that_cannot_be_begun_are_counted(evicted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case()
    case.publish(20, size=8)
    monkeypatch.setattr(case.down, "send", refuse)
    if evicted:
        case.publish(21, size=8)
    case.pool.settle()
    assert case.pool.stats().store_errors == 1 + evicted
    assert key(20) not in case.store.lookup_many([key(20)])
    case.pool.check()


def test_a_block_that_goes_down_without_room_for_it_is_counted() -> None:
    case = Case()
    case.publish(20, size=8)
    case.down.refuses = 1
    case.publish(21, size=8)  # in its place, before it was handed down
    assert case.pool.stats().store_errors == 1
    case.pool.settle()
    assert case.has_below(21, 8)
    assert key(20) not in case.store.lookup_many([key(20)])


def refuse(*given: object) -> object:
    raise RuntimeError("out of memory, for a test")


# ---- where bytes lie -------------------------------------------------------------------------------------------------


def test_what_goes_down_is_copied_once_into_the_stores_own_memory() -> None:
    case = Case()
    case.publish(20)
    case.pool.write_through()
    [[copy]] = case.down._parts
    case.pool.settle()
    stored = case.store.get_many([key(20)])[key(20)]
    assert copy.to.data_ptr() == decode(stored.data).data_ptr()
    assert stored.checked


def test_passes_with_nothing_on_its_way_wait_for_nothing() -> None:
    blocks = Blocks()
    blocks.add(key(1), kv(1))
    assert blocks.early([key(1)]).arrivals == ()
    assert Arrivals(()).starts == frozenset()
