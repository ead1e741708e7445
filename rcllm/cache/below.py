"""The store as the pool sees it: it never fails a request, and how fast each tier is gets learned from each read.

Knows nothing of the pool's budget or pins. Invariant: an exception of the store, or a block that is not whole, is a
miss and is counted; only an erasure itself may raise, for it is not best-effort, and it asks the store without this.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from rcllm.cache.lookup import Located
from rcllm.cache.rates import Rates
from rcllm.core.ranking import ContentKey
from rcllm.core.receipts import Source
from rcllm.metrics import Clock
from rcllm.model.arrivals import Arriving
from rcllm.store.codec import decode
from rcllm.store.contract import Forgetful, Found, Roomy, Store, Stored, TierStats
from rcllm.store.null import NullStore
from rcllm.store.owners import one_name
from rcllm.store.sealed import CorruptBlockError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Block:
    """A published KV block. The tensor is immutable from here on."""

    kv: torch.Tensor  # [layers, 2, kv_heads, len, columns], in the pool's dtype
    cost: float  # of computing it again, in FLOPs
    owner: str | None  # by the one name that tiers know; see store/owners.py
    arriving: Arriving | None = None  # what it is copied in with, unless that is long over

    @property
    def num_bytes(self) -> int:
        return self.kv.numel() * self.kv.element_size()


class Below:
    """One store; `space`: what all blocks that are written are made by, see `store.contract.Stored`."""

    def __init__(self, store: Store, space: str, rates: Rates, clock: Clock) -> None:
        self.store, self.space, self.rates = store, space, rates
        self._clock = clock
        self._lock = threading.Lock()  # of the counts and the rates
        # in look-ups since a tier was last read: they may fetch pages
        self._looking_s = defaultdict[Source, float](float)
        self.errors = 0

    @property
    def keeps_nothing(self) -> bool:
        return isinstance(self.store, NullStore)

    def lookup_many(self, keys: Sequence[ContentKey]) -> dict[ContentKey, Located]:
        """Where each of `keys` is, and how long reading it is estimated to take."""
        start = self._clock()
        found = self._found(keys)
        seconds, tiers = self._clock() - start, {each.tier for each in found.values()}
        with self._lock:
            for tier in tiers:
                self._looking_s[tier] += seconds / len(tiers)
        return {
            key: Located(each.tier, each.num_bytes, self.rates.fetch_ms(each.tier, each.num_bytes))
            for key, each in found.items()
        }

    def read_many(self, keys: Sequence[ContentKey]) -> dict[ContentKey, tuple[Block, Source]]:
        """Those of `keys` that are there and whole, each with its tier; on the CPU, in place where a tier allows."""
        by_tier: dict[Source, list[ContentKey]] = {}
        for key, found in self._found(keys).items():
            by_tier.setdefault(found.tier, []).append(key)
        read: dict[ContentKey, tuple[Block, Source]] = {}
        for tier, some in by_tier.items():
            start = self._clock()
            blocks = self._decoded(self._asking(lambda some=some: self.store.get_many(some)) or {})  # type: ignore[misc]
            seconds = self._clock() - start
            with self._lock:
                seconds += self._looking_s.pop(tier, 0.0)
                self.rates.bytes_of[tier].saw(sum(block.num_bytes for block in blocks.values()), seconds)
            read |= {key: (block, tier) for key, block in blocks.items()}
        return read

    def room_for(self, num_bytes: int) -> memoryview | None:
        """Memory of the store's own, for a block that is about to be handed down; None where it has none to lend."""
        store = self.store
        return self._asking(lambda: store.room_for(num_bytes)) if isinstance(store, Roomy) else None

    def sealed(self, data: memoryview, block: Block) -> Stored:
        """A block whose sealed bytes are `data`."""
        return Stored(data, block.cost, block.owner, self.space, checked=True)

    def write_many(self, blocks: Mapping[ContentKey, Stored]) -> None:
        """Hands blocks down."""
        if blocks:
            self._asking(lambda: self.store.put_many(blocks))

    def take_back(self, owner: str) -> None:
        """Removes what was handed down while its owner was erased, by somebody who was told of a store that fails."""
        self._asking(lambda: self.store.delete_owner(owner))

    def forget(self, owners: Collection[str] | None) -> None:
        """Lets the memory that the store has in this process go of owners, or of everybody."""
        store = self.store
        if isinstance(store, Forgetful):
            self._asking(lambda: store.forget(owners))

    def stats(self) -> tuple[TierStats, ...]:
        return tuple(self._asking(self.store.stats) or ())

    def passed_over(self, tiers: Iterable[Source]) -> None:
        """Blocks of these tiers were computed, since reading them was estimated to take longer."""
        with self._lock:
            for tier in tiers:
                self.rates.bytes_of[tier].hope()

    def _found(self, keys: Sequence[ContentKey]) -> Mapping[ContentKey, Found]:
        if not keys or self.keeps_nothing:
            return {}
        return self._asking(lambda: self.store.lookup_many(keys)) or {}

    def _decoded(self, stored: Mapping[ContentKey, Stored]) -> dict[ContentKey, Block]:
        blocks = {}
        for key, block in stored.items():
            try:
                blocks[key] = Block(decode(block.data, checked=block.checked), block.cost, one_name(block.owner))
            except CorruptBlockError:
                self.count_errors()
        return blocks

    def _asking(self, ask: Callable[[], T]) -> T | None:
        """What the store answers; None, counted, where it fails."""
        try:
            return ask()
        except Exception:
            self.count_errors()
            return None

    def count_errors(self, count: int = 1) -> None:
        """Blocks or calls that failed: misses, for whoever asked."""
        with self._lock:
            self.errors += count
