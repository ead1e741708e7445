"""The contract of the tiers below the pool.

A store may lose what it was given; it may never return something else. Whoever calls it treats an exception as a miss.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from rcllm.core.ranking import ContentKey


@dataclass(frozen=True, slots=True)
class StoredBlock:
    """A published KV block with what its keeper must know. The tensor is immutable from here on."""

    kv: torch.Tensor  # [layers, 2, kv_heads, len, head_dim], in the KV dtype
    cost: float  # of computing it again, in FLOPs
    owner: str | None

    @property
    def num_bytes(self) -> int:
        return self.kv.numel() * self.kv.element_size()


@dataclass(frozen=True, slots=True)
class StoreStats:
    num_blocks: int
    num_bytes: int
    budget_bytes: int


class Store(Protocol):
    """Keeps KV blocks by content key. Safe to call from several threads; every method may raise."""

    def get_many(self, keys: Iterable[ContentKey]) -> Mapping[ContentKey, StoredBlock]:
        """Those of `keys` that it has."""

    def put_many(self, blocks: Mapping[ContentKey, StoredBlock]) -> None:
        """Takes what it can; may drop other blocks, or these."""

    def contains_many(self, keys: Sequence[ContentKey]) -> Sequence[bool]: ...

    def delete_owner(self, owner: str) -> int:
        """Removes every block of an item or user; returns how many. After it returns, none can be read."""

    def stats(self) -> StoreStats: ...
