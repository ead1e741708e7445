"""The contract of the tiers below the pool. It speaks of bytes and what a keeper must know of them, never of tensors.

A tier may lose what it was given; it may never return something else: the codec adds a checksum, and a block that fails
it is a miss. Whoever calls a tier treats an exception as a miss as well, except from `delete_owner`, for erasing is not
best-effort.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from rcllm.core.ranking import ContentKey
from rcllm.core.receipts import Source


@dataclass(frozen=True, slots=True)
class Stored:
    """A published block as the codec wrote it, with what its keeper must know. Immutable."""

    data: memoryview  # header, checksum and KV; see store/codec.py
    cost: float  # of computing it again, in FLOPs
    owner: str | None  # item or user, by whom it is erased

    @property
    def num_bytes(self) -> int:
        return self.data.nbytes


@dataclass(frozen=True, slots=True)
class Found:
    """Where a block is, and what it takes to have it on the device."""

    tier: Source
    num_bytes: int
    ms: float  # estimated until it is there; 0 for what is


@dataclass(frozen=True, slots=True)
class StoreStats:
    num_blocks: int
    num_bytes: int
    budget_bytes: int


class Store(Protocol):
    """Keeps blocks by content key. Safe to call from several threads; every method may raise."""

    def lookup_many(self, keys: Iterable[ContentKey]) -> Mapping[ContentKey, Found]:
        """Those of `keys` that it has. Reads no block, and is a hint: another thread's eviction may outdate it."""

    def get_many(self, keys: Iterable[ContentKey]) -> Mapping[ContentKey, Stored]:
        """Those of `keys` that it has."""

    def put_many(self, blocks: Mapping[ContentKey, Stored]) -> None:
        """Takes what it can; may drop other blocks, or these."""

    def delete_owner(self, owner: str) -> int:
        """Removes every block of an item or user; returns how many. After it returns, none can be read."""

    def stats(self) -> StoreStats: ...
