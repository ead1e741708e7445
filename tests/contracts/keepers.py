"""Every keeper of blocks, by name: what the contract test and the state machine run."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import numpy as np

from rcllm.core.ranking import ContentKey
from rcllm.core.receipts import Source
from rcllm.store.arena import Arena
from rcllm.store.contract import Store, Stored
from rcllm.store.disk import DiskStore
from rcllm.store.faulty import Faults, FaultyStore
from rcllm.store.memory import MemoryStore
from rcllm.store.null import NullStore
from rcllm.store.sealed import CorruptBlockError, finish, open_sealed, seal
from rcllm.store.tiered import Tiered
from rcllm.store.valkey import ValkeyStore

KV_BYTES = 48
BLOCK_BYTES = 48 + KV_BYTES  # with its header
BUDGET = 10 * BLOCK_BYTES
NO_QUEUE = "tiered, no queue"  # what it has may be older than what was put last
_prefixes = itertools.count()


@dataclass(frozen=True, slots=True)
class Place:
    """Where a keeper may keep what lasts: made anew at the same place, it has what it had."""

    folder: Path
    port: Callable[[], int]  # of a server, which is started when it is first asked for
    prefix: str = field(default_factory=lambda: f"test-{next(_prefixes)}:")

    def disk(self) -> DiskStore:
        return DiskStore.open(self.folder, BUDGET)

    def valkey(self) -> ValkeyStore:
        return ValkeyStore(f"valkey://127.0.0.1:{self.port()}/0", prefix=self.prefix, read_s=10.0)


def arena(num_blocks: int) -> Arena:
    return Arena(np.zeros(num_blocks * BLOCK_BYTES, np.uint8), page_bytes=32)


def memory() -> MemoryStore:
    return MemoryStore(BUDGET)


def tiered(place: Place) -> Tiered:
    lasting: dict[Source, Store] = {"disk": memory(), "shared": MemoryStore(4 * BUDGET)}
    return Tiered(lasting, memory_bytes=BUDGET // 2, queue_bytes=4 * BUDGET)


def over_a_server(place: Place) -> Tiered:
    return Tiered({"shared": place.valkey()}, memory_bytes=BUDGET // 2, queue_bytes=4 * BUDGET)


KEEPERS: dict[str, Callable[[Place], Store]] = {
    "null": lambda place: NullStore(),
    "memory": lambda place: memory(),
    "memory, in an arena": lambda place: MemoryStore.within(arena(12)),
    "memory, no room": lambda place: MemoryStore(BLOCK_BYTES - 1),
    "disk": Place.disk,
    "valkey": Place.valkey,
    "tiered": tiered,
    "tiered, behind alone": lambda place: Tiered({"disk": memory()}, queue_bytes=4 * BUDGET),
    "tiered, over an arena": lambda place: Tiered({"disk": memory()}, arena=arena(6), queue_bytes=4 * BUDGET),
    "tiered, memory alone": lambda place: Tiered({}, memory_bytes=BUDGET, queue_bytes=0),
    NO_QUEUE: lambda place: Tiered({"disk": memory()}, memory_bytes=BUDGET, queue_bytes=0),
    "tiered, over a server": over_a_server,
    "tiered, over a disk": lambda place: Tiered(
        {"disk": place.disk()}, memory_bytes=BUDGET // 2, queue_bytes=4 * BUDGET
    ),
    "faulty, without faults": lambda place: FaultyStore(memory(), Faults(), Random(0)),
}
LASTING = {
    "disk",
    "valkey",
    "tiered, over a server",
    "tiered, over a disk",
}  # made anew at the same place, they have what they had

FAULTS = Faults(failed=0.1, slow=0.1, dropped=0.1, lost=0.1, flipped=0.1, truncated=0.1)


def faulty(rng: Random, faults: Faults = FAULTS) -> FaultyStore:
    return FaultyStore(memory(), faults, rng, sleep=lambda seconds: None)


def faulty_tiers(rng: Random) -> Tiered:
    """Under a clock by which pauses end soon."""
    ticks = itertools.count()
    lasting: dict[Source, Store] = {"disk": faulty(rng), "shared": faulty(rng)}
    return Tiered(lasting, memory_bytes=BUDGET // 2, queue_bytes=BUDGET, clock=lambda: 0.2 * next(ticks))


FAULTY: dict[str, Callable[[Random], Store]] = {"faulty": faulty, "tiered, over faulty tiers": faulty_tiers}


def key(number: int) -> ContentKey:
    return ContentKey(number.to_bytes(32, "big"))


def block(number: int, owner: str | None = None, version: int = 0) -> Stored:
    """A sealed block, whose bytes tell its number and version."""
    out, room = seal("int8", (1, 2, 1, KV_BYTES // 2, 1))
    room[:] = bytes([number, version]) * (KV_BYTES // 2)
    return Stored(finish(out), 1.0 + number, owner, f"space {number % 2}")


def version_of(number: int, stored: Stored) -> int | None:
    """Which version of block `number` it is; None when its checksum shows that it is none."""
    try:
        found, version = bytes(open_sealed(stored.data).kv[:2])
    except CorruptBlockError:
        return None
    assert stored.data == block(number, version=version).data
    assert (found, stored.cost, stored.space) == (number, 1.0 + number, f"space {number % 2}")
    return version


def settle(store: Store) -> None:
    """Waits for what is written behind."""
    if isinstance(store, Tiered):
        store.flush()


def check(store: Store) -> None:
    if hasattr(store, "check"):
        store.check()
