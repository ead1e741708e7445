"""The blocks that one batch works with, pinned, and how they are read while some are still on their way.

Knows nothing of budgets or tiers. Invariant: whoever looks a block up in `Held.blocks` reads it when it is there, for
its copies are waited for; only `Blocks.early` gives it before, together with what a pass must wait for.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from rcllm.cache.below import Block
from rcllm.core.ranking import ContentKey
from rcllm.core.receipts import Source
from rcllm.model.arrivals import Arrivals, Arriving
from rcllm.model.kv_int8 import kept
from rcllm.store.owners import one_name

if TYPE_CHECKING:
    from rcllm.cache.pool import Pool


@dataclass(frozen=True, slots=True)
class Acquired:
    """What there is of the blocks that were asked for."""

    erasures: int  # how many owners had been erased by then
    pinned: dict[ContentKey, tuple[Block, Source]] = field(default_factory=dict)
    in_place: dict[ContentKey, tuple[Block, Source]] = field(default_factory=dict)  # read where a tier keeps them


class Blocks(Mapping[ContentKey, torch.Tensor]):
    """KV by key. To look it up is to read it, so the device waits for what is still on its way; the host does not."""

    def __init__(self) -> None:
        self._kv: dict[ContentKey, torch.Tensor] = {}
        self._arriving: dict[ContentKey, Arriving] = {}

    def __getitem__(self, key: ContentKey) -> torch.Tensor:
        if (arriving := self._arriving.pop(key, None)) is not None:
            arriving.wait()
        return self._kv[key]

    def __contains__(self, key: object) -> bool:
        return key in self._kv

    def __iter__(self) -> Iterator[ContentKey]:
        return iter(self._kv)

    def __len__(self) -> int:
        return len(self._kv)

    def add(self, key: ContentKey, kv: torch.Tensor, arriving: Arriving | None = None) -> None:
        self._kv[key] = kv
        if arriving is not None:
            self._arriving[key] = arriving

    def early(self, keys: Iterable[ContentKey]) -> Early:
        """Some of them without waiting: for a pass, which waits for each part before the layer that reads it."""
        kv = {key: self._kv[key] for key in keys}
        arriving = dict.fromkeys(self._arriving[key] for key in kv if key in self._arriving)
        return Early(kv, (Arrivals(arriving),) if arriving else ())


@dataclass(frozen=True, slots=True)
class Early:
    """KV of which some may be on its way."""

    kv: Mapping[ContentKey, torch.Tensor]
    arrivals: tuple[Arrivals, ...]  # of the pass that reads it; empty: all of it is there


class Held:
    """Get one from `Pool.hold`."""

    def __init__(self, pool: Pool, since: int | None = None) -> None:
        self._pool, self._since = pool, since
        self.blocks = Blocks()
        self.sources: dict[ContentKey, Source] = {}
        self._lent: set[ContentKey] = set()
        self.in_place: dict[ContentKey, Block] = {}

    def fetch(self, keys: Iterable[ContentKey], dear: Container[ContentKey] = ()) -> list[ContentKey]:
        """Gets those of `keys` that exist, and returns those that do not; of `dear` ones, the store is not asked."""
        new = [key for key in dict.fromkeys(keys) if key not in self.blocks]
        got = self._pool.acquire(new, dear)
        for key, (block, source) in (got.pinned | got.in_place).items():
            self.blocks.add(key, block.kv, block.arriving)
            self.sources[key] = source
        self.in_place |= {key: block for key, (block, _) in got.in_place.items()}
        return [key for key in new if key not in self.blocks]

    def publish(self, key: ContentKey, kv: torch.Tensor, cost: float, owner: str | None) -> None:
        """Copies `kv` into the pool in its dtype, pinned. Raises CapacityError when pinned blocks leave no room.

        A block whose owner was erased meanwhile is this batch's alone.
        """
        if key in self.blocks:
            return
        listed = self._pool.insert(key, Block(kv, cost, one_name(owner)), self._since, written=False)
        if listed is None:
            self.lend(key, kept(kv, self._pool.dtype, self._pool.device), "computed")
            return
        self.blocks.add(key, listed.kv, listed.arriving)
        self.sources[key] = "computed"

    def lend(self, key: ContentKey, kv: torch.Tensor, source: Source) -> None:
        """Adds a block for this batch alone, in place: the pool never has it, and it ends with the release."""
        assert key not in self.blocks or key in self._lent, "a lent block never stands in for a published one"
        self.blocks.add(key, kv)
        self.sources[key] = source
        self._lent.add(key)

    def also(self, keys: Iterable[ContentKey]) -> Held:
        """Another holder of some of the same blocks, which may outlive this one.

        Not of those that were lent or are read in place: the pool does not have them, and a tensor keeps its own bytes.
        """
        other, elsewhere = Held(self._pool), self._lent | self.in_place.keys()
        for key in self._pool.pin_again(key for key in dict.fromkeys(keys) if key not in elsewhere):
            other.blocks.add(key, self.blocks[key])
            other.sources[key] = self.sources[key]
        return other

    def release(self) -> None:
        self._pool.release(key for key in self.blocks if key not in self._lent and key not in self.in_place)
        self.blocks, self.sources, self._lent, self.in_place = Blocks(), {}, set(), {}
