"""Tiers under four threads for some seconds: no wrong answer, no deadlock, and counts that agree.

Each thread owns some blocks, and alone puts and erases them; all threads read all blocks, and so copy them between
tiers while their owner replaces and erases them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from random import Random

import pytest

from rcllm.core.receipts import Source
from rcllm.errors import ErasureError
from rcllm.store.contract import Store
from rcllm.store.faulty import Faults, FaultyStore
from rcllm.store.memory import MemoryStore
from rcllm.store.tiered import Tiered
from tests.contracts.keepers import BLOCK_BYTES, block, key, version_of

THREADS, BLOCKS, SECONDS = 4, 40, 2.5
SLOW = Faults(slow=0.5, slow_s=0.0005)
BAD = Faults(failed=0.05, slow=0.2, slow_s=0.0005, dropped=0.05, lost=0.05, flipped=0.05, truncated=0.05)


@dataclass(slots=True)
class Owner:
    """One thread, and the versions that it put of each of its blocks since it erased them last."""

    me: int
    store: Tiered
    older_may_stay: bool
    rng: Random
    put_since_erased: dict[int, list[int]] = field(default_factory=dict)
    num_reads: int = 0
    num_found: int = 0

    def run(self) -> None:
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            step: Callable[[], None] = self.rng.choices([self.put, self.read, self.erase], [4, 8, 1])[0]
            step()

    def owner(self, number: int) -> str:
        return f"owner {number % THREADS} {number % 3}"

    def put(self) -> None:
        version = self.rng.randrange(256)
        mine = [n for n in self.rng.sample(range(BLOCKS), 8) if n % THREADS == self.me]
        self.store.put_many({key(n): block(n, self.owner(n), version) for n in mine})
        for n in mine:
            self.put_since_erased.setdefault(n, []).append(version)

    def read(self) -> None:
        wanted = self.rng.sample(range(BLOCKS), 8)
        self.store.lookup_many(map(key, wanted))
        found = self.store.get_many(map(key, wanted))
        self.num_reads += len(wanted)
        self.num_found += len(found)
        for n in wanted:
            version = version_of(n, found[key(n)]) if key(n) in found else None
            if version is not None and n % THREADS == self.me:
                known = self.put_since_erased.get(n, [])
                assert version in (known if self.older_may_stay else known[-1:]), f"{version} of {n}, put: {known}"

    def erase(self) -> None:
        which = f"owner {self.me} {self.rng.randrange(3)}"
        while True:
            try:
                self.store.delete_owner(which)
                break
            except ErasureError:
                continue
        for n in [n for n in self.put_since_erased if self.owner(n) == which]:
            del self.put_since_erased[n]


def memory(num_blocks: int) -> MemoryStore:
    return MemoryStore(num_blocks * BLOCK_BYTES)


@pytest.mark.parametrize("faults", [SLOW, BAD], ids=["slow", "bad"])
def test_four_threads(faults: Faults) -> None:
    """With tiers that work and a queue that has room, what is read is what was put last, or nothing."""
    lasting: dict[Source, Store] = {
        "disk": FaultyStore(memory(20), SLOW, Random(1)),
        "shared": FaultyStore(memory(30), faults, Random(2)),
    }
    started = time.monotonic()
    store = Tiered(
        lasting,
        memory_bytes=8 * BLOCK_BYTES,
        queue_bytes=3 * BLOCKS * BLOCK_BYTES,
        clock=lambda: 100 * time.monotonic(),  # pauses of some milliseconds
    )
    owners = [Owner(me, store, faults is BAD, Random(10 + me)) for me in range(THREADS)]
    with ThreadPoolExecutor(THREADS) as threads:
        for outcome in [threads.submit(owner.run) for owner in owners]:
            outcome.result(timeout=60)
    store.flush()
    store.check()
    stats = {tier.tier if place == 0 else f"lasting {place}": tier for place, tier in enumerate(store.stats())}
    assert all(tier.num_bytes == tier.num_blocks * BLOCK_BYTES <= tier.budget_bytes for tier in stats.values())
    assert all(tier.promoted <= tier.hits for tier in stats.values())
    assert stats["lasting 1"].promoted > 0
    assert stats["lasting 2"].promoted > 0
    assert (stats["lasting 2"].errors > 0) == (faults is BAD)
    assert stats["lasting 1"].dropped == 0, "the queue had room"
    num_found = sum(owner.num_found for owner in owners)
    assert num_found > 1000
    assert num_found < sum(owner.num_reads for owner in owners)
    store.close()
    assert time.monotonic() - started < 10 * SECONDS
