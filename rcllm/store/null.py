"""A tier that keeps nothing: what stands below the pool where no other was asked for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from rcllm.core.ranking import ContentKey
from rcllm.store.contract import StoredBlock, StoreStats


class NullStore:
    """Keeps nothing."""

    def get_many(self, keys: Iterable[ContentKey]) -> Mapping[ContentKey, StoredBlock]:
        return {}

    def put_many(self, blocks: Mapping[ContentKey, StoredBlock]) -> None:
        pass

    def contains_many(self, keys: Sequence[ContentKey]) -> Sequence[bool]:
        return [False] * len(keys)

    def delete_owner(self, owner: str) -> int:
        return 0

    def stats(self) -> StoreStats:
        return StoreStats(0, 0, 0)
