"""A tier that keeps nothing: what stands below the pool where no other was asked for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from rcllm.core.ranking import ContentKey
from rcllm.store.contract import Found, Stored, TierStats


class NullStore:
    """Every look-up is a miss, and every block that it is given is dropped."""

    def lookup_many(self, keys: Iterable[ContentKey]) -> Mapping[ContentKey, Found]:
        return {}

    def get_many(self, keys: Iterable[ContentKey]) -> Mapping[ContentKey, Stored]:
        return {}

    def put_many(self, blocks: Mapping[ContentKey, Stored]) -> None:
        pass

    def delete_owner(self, owner: str) -> int:
        return 0

    def stats(self) -> Sequence[TierStats]:
        return ()

    def close(self) -> None:
        pass
