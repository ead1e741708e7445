"""The pool against a model of it: what is published stays while held, within the budget, whatever is done."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from rcllm.cache.held import Held
from rcllm.cache.lanes import Lanes
from rcllm.cache.pool import Pool
from rcllm.core.ranking import ContentKey
from rcllm.errors import CapacityError
from rcllm.store.arena import Arena
from rcllm.store.codec import decode, encode
from rcllm.store.contract import Store, Stored
from rcllm.store.disk import Erased
from rcllm.store.memory import MemoryStore
from rcllm.store.owners import digest, one_name
from tests.cache.lazily import Elsewhere, lazy_lanes
from tests.engine.test_capacity import BrokenStore

CPU = torch.device("cpu")
BUDGET_TOKENS = 20
NUM_LAYERS = 2
TOKEN_BYTES = NUM_LAYERS * 2 * 2 * 4  # [layers, K and V, 1 head, 1 token, 2 dims] in fp32


def key(number: int) -> ContentKey:
    return ContentKey(bytes([number]) * 32)


def kv(number: int, size: int | None = None) -> torch.Tensor:
    """Block `number`: its contents tell which it is, its length is fixed."""
    return torch.full((NUM_LAYERS, 2, 1, number % 6 + 1 if size is None else size, 2), float(number))


def owner(number: int) -> str:
    return f"owner {number % 3}"


class PoolMachine(RuleBasedStateMachine):
    """What must hold: contents are right, held blocks stay, erased ones go, and the budget is kept."""

    budget_tokens, kind = BUDGET_TOKENS, Pool

    @initialize(
        tier=st.sampled_from(["none", "memory", "broken"]),
        page_tokens=st.sampled_from([0, 1, 2]),
        late=st.booleans(),
    )
    def make(self, tier: str, page_tokens: int, late: bool) -> None:
        stores = {"none": None, "memory": MemoryStore(4 * len(encode(kv(0, 3)))), "broken": BrokenStore()}
        self.begin(stores[tier], page_tokens, lazy_lanes() if late else None)

    def begin(self, store: Store | None, page_tokens: int, lanes: Lanes | None) -> None:
        self.store = store
        page_bytes = page_tokens * TOKEN_BYTES  # of one tensor for all blocks; 0: each has its own
        self.pool = self.kind(
            self.budget_tokens * TOKEN_BYTES,
            torch.float32,
            CPU,
            self.store,
            page_bytes=page_bytes,
            lanes=lanes,
        )
        self.held: list[tuple[Held, set[int]]] = []
        self.published: set[int] = set()  # ever, and not erased since: what may be found

    @rule(count=st.integers(1, 2))
    def hold(self, count: int) -> None:
        for _ in range(count):
            self.held.append((Held(self.pool), set()))

    @precondition(lambda self: self.held)
    @rule(who=st.integers(0, 9), number=st.integers(0, 11))
    def publish(self, who: int, number: int) -> None:
        held, mine = self.held[who % len(self.held)]
        before = set(self.pool._blocks)
        try:
            held.publish(key(number), kv(number), 1.0 + number, owner(number))
        except CapacityError:
            assert set(self.pool._blocks) == before, "a refusal changes nothing"
            return
        mine.add(number)
        if key(number) in self.pool._blocks:  # not so when it was erased while this holder kept it
            self.published.add(number)

    @precondition(lambda self: self.held)
    @rule(who=st.integers(0, 9), numbers=st.lists(st.integers(0, 11), max_size=4))
    def fetch(self, who: int, numbers: list[int]) -> None:
        held, mine = self.held[who % len(self.held)]
        pins = sum(self.pool._index._pins.values())
        try:
            missing = held.fetch(map(key, numbers))
        except CapacityError:
            assert sum(self.pool._index._pins.values()) == pins, "a refusal leaves no pin"
            return
        got = {number for number in numbers if key(number) not in missing}
        assert got <= self.published | mine
        mine |= got

    @precondition(lambda self: self.held)
    @rule(who=st.integers(0, 9))
    def read(self, who: int) -> None:
        held, mine = self.held[who % len(self.held)]
        for number in mine:
            assert torch.equal(held.blocks[key(number)], kv(number))

    @rule(waits=st.booleans())
    def hand_down(self, waits: bool) -> None:
        if waits:
            self.pool.settle()
        else:
            self.pool.write_through()

    @precondition(lambda self: self.held)
    @rule(who=st.integers(0, 9))
    def release(self, who: int) -> None:
        self.held.pop(who % len(self.held))[0].release()

    @rule(number=st.integers(0, 2))
    def erase(self, number: int) -> None:
        try:
            self.pool.delete_owner(owner(number))
        except OSError:
            assert isinstance(self.store, BrokenStore)
        gone = {n for n in range(12) if owner(n) == owner(number)}
        self.published -= gone
        assert not any((key(n) in self.pool.lookup_many([key(n)])) for n in gone)

    @rule()
    def clear(self) -> None:
        self.pool.clear()
        assert not self.pool._blocks

    @invariant()
    def whole(self) -> None:
        if not hasattr(self, "pool"):
            return
        self.pool.check()
        if isinstance(self.store, MemoryStore):
            self.store.check()
        assert self.pool.budget - self.pool.free_bytes <= self.budget_tokens * TOKEN_BYTES
        for held, mine in self.held:
            assert held.blocks.keys() == set(map(key, mine))
            for number in mine:
                early = held.blocks.early([key(number)])
                if not any(each.starts for each in early.arrivals):
                    assert torch.equal(early.kv[key(number)], kv(number)), "what is held never changes"
        for number in range(12):
            if (block := self.pool._blocks.get(key(number))) is not None:
                assert number in self.published
                if block.arriving is None or block.arriving.is_over:
                    assert torch.equal(block.kv, kv(number))
        if isinstance(self.store, MemoryStore):
            for name, stored in self.store.get_many(map(key, range(12))).items():
                assert name[0] in self.published
                assert torch.equal(decode(stored.data), kv(name[0])), "and nothing else goes below"
        pins = sum(len(mine) - len(held.in_place) for held, mine in self.held)
        assert sum(self.pool._index._pins.values()) == pins

    def teardown(self) -> None:
        for held, _ in getattr(self, "held", []):
            held.release()
        if hasattr(self, "pool"):
            self.held = []
            assert not self.pool._index._pins
            self.pool.settle()
            self.whole()


class CopyingMachine(PoolMachine):
    """The same beside a GPU, as it were: pages, copies that end late or at any time, and all blocks in an arena below.

    There is little room, and passes come and go without a look at what they fetch and publish.
    """

    budget_tokens, kind = 8, Elsewhere

    @initialize(rng=st.one_of(st.none(), st.randoms(use_true_random=False)), page_tokens=st.sampled_from([1, 2]))
    def make(self, rng: Random | None, page_tokens: int) -> None:  # type: ignore[override]
        store = MemoryStore.within(Arena(np.zeros(60 * len(encode(kv(0, 3))), np.uint8), page_bytes=64))
        store.put_many({key(n): Stored(encode(kv(n)), 1.0 + n, one_name(owner(n))) for n in range(12)})
        self.begin(store, page_tokens, lazy_lanes(rng))
        self.published = set(range(12))

    @rule(fetched=st.lists(st.integers(0, 11), max_size=3), published=st.lists(st.integers(0, 11), max_size=2))
    def run(self, fetched: list[int], published: list[int]) -> None:
        with self.pool.hold() as held, contextlib.suppress(CapacityError):
            missing = set(held.fetch(map(key, fetched)))
            for number in (*(n for n in fetched if key(n) in missing), *published):
                held.publish(key(number), kv(number), 1.0 + number, owner(number))
                self.published.add(number)


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestCopyingMachine = CopyingMachine.TestCase
TestCopyingMachine.settings = settings(max_examples=80, stateful_step_count=50, deadline=None)


def pool(tokens: int, store: object = None, dtype: torch.dtype = torch.float32) -> Pool:
    return Pool(tokens * TOKEN_BYTES, dtype, CPU, store)  # type: ignore[arg-type]


def put(target: Pool, *numbers: int, size: int = 1) -> None:
    with target.hold() as held:
        for number in numbers:
            held.publish(key(number), kv(number, size), 1.0, owner(number))
    target.write_through()


def test_what_does_not_fit_leaves_everything_as_it_was() -> None:
    target = pool(4)
    put(target, 0, 1)
    with target.hold() as held, pytest.raises(CapacityError):
        held.publish(key(9), kv(9, 5), 1.0, None)
    assert set(target._blocks) == {key(0), key(1)}
    assert target.stats().evictions == 0
    target.check()


def test_a_block_that_does_not_fit_is_read_where_its_tier_keeps_it() -> None:
    store = MemoryStore(1 << 20)
    target = pool(4, store)
    put(target, 0, size=3)
    store.put_many({key(7): Stored(encode(kv(7, 3)), 1.0, owner(7))})
    with target.hold() as held:
        assert held.fetch([key(0), key(7)]) == []
        assert held.sources == {key(0): "device", key(7): "host"}
        assert torch.equal(held.blocks[key(7)], kv(7, 3))
        assert key(7) not in target._blocks, "nothing made way for it"
        target.delete_owner(owner(7))
        assert torch.equal(held.blocks[key(7)], kv(7, 3)), "what is held stays"
    target.check()
    assert not target._index._pins
    put(target, 9, size=4)


def test_whoever_outlives_a_pass_keeps_what_the_pool_has_and_tensors_keep_what_is_read_in_place() -> None:
    store = MemoryStore(1 << 20)
    target = pool(4, store)
    put(target, 0, size=2)
    put(target, 1, size=1)
    store.put_many({key(7): Stored(encode(kv(7, 2)), 1.0, owner(7))})
    with target.hold() as held:
        held.fetch([key(0), key(1), key(7)])
        in_place = held.blocks[key(7)]
        target.delete_owner(owner(1))
        longer = held.also([key(0), key(1), key(7)])
    assert set(longer.blocks) == {key(0)}, "an erased block is nobody's to keep"
    assert torch.equal(in_place, kv(7, 2))
    put(target, 9, size=2)
    assert torch.equal(longer.blocks[key(0)], kv(0, 2))
    longer.release()
    target.check()
    assert not target._index._pins


def test_a_block_of_another_device_or_dtype_is_copied_in_and_leaves_no_pin_where_it_does_not_fit() -> None:
    """A regression: the blocks of the same fetch that were there stayed pinned for ever."""
    store = MemoryStore(1 << 20)
    target = pool(4, store)
    put(target, 0, size=3)
    store.put_many({key(7): Stored(encode(kv(7, 3).half()), 1.0, None)})
    with target.hold() as held, pytest.raises(CapacityError):
        held.fetch([key(0), key(7)])
    target.check()
    assert not target._index._pins
    put(target, 9, size=4)


def test_evicted_blocks_go_below_and_come_back() -> None:
    target = pool(2, MemoryStore(1 << 20))
    put(target, 0, 1)
    put(target, 2)
    assert key(0) not in target._blocks
    assert key(0) in target.lookup_many([key(0)])
    with target.hold() as held:
        assert held.fetch([key(0), key(0), key(5)]) == [key(5)]
        assert held.sources == {key(0): "host"}
        assert torch.equal(held.blocks[key(0)], kv(0, 1))
    stats = target.stats()
    assert (stats.hits, stats.misses, stats.store_errors) == ({"host": 1}, 1, 0)


def test_the_heap_is_tidied_after_each_quarter_of_the_pool_that_went(monkeypatch: pytest.MonkeyPatch) -> None:
    tidied = []
    monkeypatch.setattr("rcllm.cache.pool.hand_back", lambda: tidied.append(True))
    target = pool(8)
    for number in range(16):  # the first eight only fill it, and of the others each pushes one out
        put(target, number)
        target.tidy()
    assert len(tidied) == 2  # when three of eight had gone, and six


def test_published_blocks_are_copies_in_the_pools_dtype() -> None:
    target = pool(4, dtype=torch.float16)
    source = kv(3, 1)
    with target.hold() as held:
        held.publish(key(3), source, 1.0, None)
        source.zero_()
        assert held.blocks[key(3)].dtype == torch.float16
        assert held.blocks[key(3)].is_contiguous()
        assert (held.blocks[key(3)] == 3.0).all()
        assert target.stats().num_bytes == TOKEN_BYTES // 2


def test_a_store_that_raises_is_a_miss_and_counted() -> None:
    target = pool(1, BrokenStore())
    put(target, 0)
    put(target, 1)
    assert key(5) not in target.lookup_many([key(5)])  # lookup_many raises
    with target.hold() as held:
        assert held.fetch([key(5)]) == [key(5)]  # so does the look-up before reading
    assert target.stats().tiers == ()  # stats raises
    assert target.stats().store_errors == 2 + 2 + 1 + 1, "two puts had raised before"
    target.check()


class HalfStore(MemoryStore):
    """Fails on every second read."""

    reads = 0

    def get_many(self, keys: Iterable[ContentKey]) -> Mapping[ContentKey, Stored]:
        self.reads += 1
        if self.reads % 2:
            raise TimeoutError("slow")
        return super().get_many(keys)


def test_a_store_that_recovers_is_used_again() -> None:
    target = pool(1, HalfStore(1 << 20))
    put(target, 0)
    put(target, 1)
    for expected in ([key(0)], []):
        with target.hold() as held:
            assert held.fetch([key(0)]) == expected


def test_an_erased_block_lives_on_with_its_holder_alone() -> None:
    target = pool(4)
    with target.hold() as held:
        held.publish(key(0), kv(0, 1), 1.0, "ann")
        assert target.delete_owner("ann") == 1
        assert torch.equal(held.blocks[key(0)], kv(0, 1))
        with target.hold() as other:
            assert other.fetch([key(0)]) == [key(0)]
            other.publish(key(0), kv(0, 1), 1.0, "ann")
        target.check()
    assert not target._index._pins
    target.check()


@pytest.mark.parametrize("complete", [True, False])
def test_what_is_computed_while_another_process_erases_its_owner_is_its_holders_alone(complete: bool) -> None:
    target = pool(4, MemoryStore(1 << 20), torch.float16)
    since = target.lookup_many([]).erasures
    target.heed(Erased(1, frozenset({digest("ann")} if complete else ()), complete))
    with target.hold(since) as held:
        held.publish(key(2), kv(2, 1), 1.0, "ann")
        held.publish(key(3), kv(3, 1), 1.0, None)
        assert torch.equal(held.blocks[key(2)], kv(2, 1).half()), "as the pool would keep it"
        assert set(held.also([key(2), key(3)]).blocks) == {key(3)}
    target.settle()
    assert key(2) not in target.lookup_many([key(2)])
    with target.hold(target.lookup_many([]).erasures) as held:
        held.publish(key(2), kv(2, 1), 1.0, "ann")
    assert set(target._blocks) == {key(2), key(3)}, "what is asked for afterwards is kept"
    target.check()


def test_a_store_that_cannot_take_back_what_was_erased_meanwhile_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A regression: the pass that handed it down failed, and with it whoever waited."""
    store = MemoryStore(1 << 20)
    target, put_many = pool(4, store), store.put_many

    def erased_meanwhile(blocks: Mapping[ContentKey, Stored]) -> None:
        target.heed(Erased(1, frozenset({digest(owner(0))}), complete=True))
        put_many(blocks)

    def broken(owner: str) -> int:
        raise OSError("broken")

    monkeypatch.setattr(store, "put_many", erased_meanwhile)
    monkeypatch.setattr(store, "delete_owner", broken)
    put(target, 0)
    assert target.stats().store_errors == 1


def test_a_lent_block_is_its_holders_alone_and_ends_with_it() -> None:
    pool = Pool(BUDGET_TOKENS * TOKEN_BYTES, torch.float32, CPU, MemoryStore(4 * len(encode(kv(0, 3)))))
    with pool.hold() as held:
        held.publish(key(1), kv(1), 1.0, None)
        lent = kv(2)
        held.lend(key(2), lent, "semantic")
        assert held.fetch([key(2)]) == []
        assert held.blocks[key(2)] is lent
        assert held.sources[key(2)] == "semantic"
        assert key(2) not in pool.lookup_many([key(2)])
        with pytest.raises(AssertionError, match="never stands in for"):
            held.lend(key(1), lent, "semantic")
        with pool.hold() as other:
            assert other.fetch([key(2)]) == [key(2)]
    pool.check()
    assert not pool._index._pins
    assert key(1) in pool.lookup_many([key(1)])
    assert key(2) not in pool.lookup_many([key(2)])
