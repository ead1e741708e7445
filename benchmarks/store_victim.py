"""A process that writes to a store until it is killed, and what its blocks must be: for `benchmarks.store_safety`.

Imports nothing slow, for hundreds of it are started. Invariant: a block's bytes are known from its number.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from rcllm.core.ranking import ContentKey
from rcllm.store.contract import Stored
from rcllm.store.disk import DiskStore
from rcllm.store.sealed import CorruptBlockError, finish, open_sealed, seal
from rcllm.store.tiered import Tiered

NUM_KEYS = 60
_NUM_OWNERS = 5
BUDGET_BYTES = 6_000_000  # about half of all blocks


def key(number: int) -> ContentKey:
    return ContentKey(number.to_bytes(32, "big"))


def block(number: int) -> Stored:
    """Of 20 to 400 KB."""
    size = 20_000 + number * 6_400
    out, kv = seal("fp32", (1, 1, 1, 1, size // 4))
    np.frombuffer(kv, np.uint32)[:] = np.arange(size // 4, dtype=np.uint32) + np.uint32(number * 1_000_003)
    return Stored(finish(out), float(number + 1), f"user:{number % _NUM_OWNERS}")


def num_wrong(found: Iterable[tuple[ContentKey, Stored]]) -> int:
    """How many of the blocks that a store served are not whole, or not what was put under their keys."""
    wrong = 0
    for each, stored in found:
        try:
            open_sealed(stored.data)
        except CorruptBlockError:
            wrong += 1
            continue
        wrong += stored.data != block(int.from_bytes(each, "big")).data
    return wrong


def churn(folder: str, seed: int) -> None:
    """Puts, written behind as an engine's are, reads, evicts, erases and opens anew, for ever."""
    rng, store = random.Random(seed), _opened(folder)
    print("begins", flush=True)
    while True:
        numbers = [rng.randrange(NUM_KEYS) for _ in range(rng.randrange(1, 8))]
        store.put_many({key(number): block(number) for number in numbers})
        assert not num_wrong(store.get_many(key(rng.randrange(NUM_KEYS)) for _ in range(5)).items())
        if rng.random() < 0.1:
            store.delete_owner(f"user:{rng.randrange(_NUM_OWNERS)}")
        if rng.random() < 0.05:
            store.close()
            store = _opened(folder)


def _opened(folder: str) -> Tiered:
    return Tiered({"disk": DiskStore.open(Path(folder), BUDGET_BYTES)}, queue_bytes=4_000_000)
