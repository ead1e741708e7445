"""The contract of the tiers below the pool. It speaks of bytes and what a keeper must know of them, never of tensors.

A tier may lose what it was given; it may never return something else: the codec adds a checksum, and a block that fails
it is a miss. Whoever calls a tier treats an exception as a miss as well, except from `delete_owner`, for erasing is not
best-effort.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np

from rcllm.core.ranking import ContentKey
from rcllm.core.receipts import Source
from rcllm.store.arena import Lent


@dataclass(frozen=True, slots=True)
class Stored:
    """A published block as the codec wrote it, with what its keeper must know. Immutable."""

    data: memoryview  # header, checksum and KV, see store/sealed.py; it keeps alive whatever it is a view of
    cost: float  # of computing it again, in FLOPs
    owner: str | None  # item or user, by whom it is erased
    space: str = ""  # names the model, adapter, template and dtypes that it was made by; see prompt/keys.py
    checked: bool = False  # it was made, or seen to be whole, in this process, whose memory it has not left since

    @property
    def num_bytes(self) -> int:
        return self.data.nbytes

    @property
    def is_owned(self) -> bool:
        """Whether nobody else may take away or change its bytes."""
        return isinstance(self.data.obj, bytes | bytearray | Lent)

    def owned(self) -> Stored:
        """The same block with bytes that are: a copy, unless they are so already."""
        return self if self.is_owned else replace(self, data=memoryview(bytes(self.data)))

    def copied_to(self, room: memoryview) -> Stored:
        """The same block in other bytes, of as many."""
        np.copyto(np.frombuffer(room, np.uint8), np.frombuffer(self.data, np.uint8))
        return replace(self, data=room)


@dataclass(frozen=True, slots=True)
class Found:
    """Where a block is."""

    tier: Source
    num_bytes: int


@dataclass(frozen=True, slots=True)
class TierStats:
    """What one tier has, and what became of the rest. Counts are since it was opened."""

    tier: Source
    num_blocks: int
    num_bytes: int
    budget_bytes: int
    evictions: int = 0
    dropped: int = 0  # blocks that it was given and could not take
    errors: int = 0  # calls that failed, and blocks that were found not to be whole
    hits: int = 0  # blocks that were read from it; counted where tiers stand above each other
    promoted: int = 0  # of them, those that were copied into nearer tiers
    waiting_bytes: int = 0  # of blocks that are still to be written to it


class Store(Protocol):
    """Keeps blocks by content key. Safe to call from several threads; every method may raise."""

    def lookup_many(self, keys: Iterable[ContentKey]) -> Mapping[ContentKey, Found]:
        """Those of `keys` that it has. A hint: another thread's eviction may outdate it.

        Reads no block, but announces that they will be read: a keeper may begin to bring them nearer.
        """

    def get_many(self, keys: Iterable[ContentKey]) -> Mapping[ContentKey, Stored]:
        """Those of `keys` that it has."""

    def put_many(self, blocks: Mapping[ContentKey, Stored]) -> None:
        """Takes what it can, in place of what it has under the same keys; may drop other blocks, or these.

        It copies what it keeps, for `data` may be a view of another tier.
        """

    def delete_owner(self, owner: str) -> int:
        """Removes every block of an item or user; returns how many. After it returns, none can be read.

        Where several tiers had copies, it returns the most that one of them had.
        """

    def stats(self) -> Sequence[TierStats]:
        """Of each tier, the nearest first."""

    def close(self) -> None:
        """Ends what it began; what it had taken by then is kept where it lasts. Nothing is asked of it afterwards."""


@runtime_checkable
class Roomy(Protocol):
    """A store whose nearest tier lends memory of its own, so that what is put there need not be copied."""

    def room_for(self, num_bytes: int) -> memoryview | None:
        """Bytes that nobody else writes to, to be filled and put; None where there are none to lend."""


@runtime_checkable
class Forgetful(Protocol):
    """A store that has some blocks in the memory of this process alone."""

    def forget(self, owners: Collection[str] | None) -> int:
        """Lets go of what it has there of owners whom another process erased; returns how many blocks.

        Owners go by their one names (store/owners.py); None: of everybody.
        """
