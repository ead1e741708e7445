"""Where the pool's blocks lie: each in memory of its own, or all of them in one tensor that is cut into pages.

One tensor is taken from the device once, so that what is evicted and what comes next cannot leave it in fragments that
nobody can use. Knows nothing of keys or budgets. Invariant: runs of pages do not overlap, and whoever frees a block or
lets it be moved has nothing under way that reads or writes it.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import Protocol, TypeVar

import torch

from rcllm.model.kv_int8 import empty_for, kept_bytes, kept_columns
from rcllm.store.runs import Runs

K = TypeVar("K", bound=Hashable)
PAGE_BYTES = 256 << 10


class Room(Protocol):
    """Memory on one device for blocks in one dtype."""

    reuses: bool  # whether what is freed is overwritten, though somebody may still have the tensor

    def num_bytes(self, kv: torch.Tensor) -> int:
        """What a block takes, once it is kept here."""

    def take(self, kv: torch.Tensor) -> torch.Tensor | None:
        """Memory for a block as it is kept here, to be filled; None where no run of pages is long enough."""

    def free(self, kv: torch.Tensor) -> None:
        """Takes back what `take` gave."""

    def compacted(self, movable: Mapping[K, torch.Tensor]) -> dict[K, torch.Tensor]:
        """Moves those blocks, which nobody reads, together; returns where they are now."""

    def check(self, blocks: Iterable[torch.Tensor]) -> None:
        """Asserts that exactly these are here."""


class Loose:
    """Each block in memory of its own, from torch's allocator, as long as anybody has it."""

    reuses = False

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype, self._device = dtype, device

    def num_bytes(self, kv: torch.Tensor) -> int:
        return kept_bytes(kv, self._dtype)

    def take(self, kv: torch.Tensor) -> torch.Tensor:
        return empty_for(kv, self._dtype, self._device)

    def free(self, kv: torch.Tensor) -> None:
        pass

    def compacted(self, movable: Mapping[K, torch.Tensor]) -> dict[K, torch.Tensor]:
        return {}

    def check(self, blocks: Iterable[torch.Tensor]) -> None:
        pass


class Paged:
    """All blocks in one tensor, which is made with the first. A block that no run fits lies loose beside it."""

    reuses = True

    def __init__(self, num_bytes: int, dtype: torch.dtype, device: torch.device, page_bytes: int) -> None:
        self._dtype, self._device, self._page_bytes = dtype, device, page_bytes
        self._runs = Runs(num_bytes // page_bytes)
        self._memory: torch.Tensor | None = None

    def num_bytes(self, kv: torch.Tensor) -> int:
        return self._pages(kv) * self._page_bytes

    def _pages(self, kv: torch.Tensor) -> int:
        return -(-kept_bytes(kv, self._dtype) // self._page_bytes)

    def take(self, kv: torch.Tensor) -> torch.Tensor | None:
        if not kv.numel():
            return empty_for(kv, self._dtype, self._device)
        first = self._runs.take(self._pages(kv))
        return None if first is None else self._view(first, (*kv.shape[:-1], kept_columns(kv, self._dtype)))

    def _view(self, first: int, shape: tuple[int, ...]) -> torch.Tensor:
        """The pages from `first` on as a block."""
        if self._memory is None:
            num_bytes = self._runs.num_pages * self._page_bytes
            self._memory = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
        pages = self._memory[first * self._page_bytes :].view(self._dtype)
        return pages[: torch.Size(shape).numel()].view(shape)

    def free(self, kv: torch.Tensor) -> None:
        first = self._first(kv)
        if first is not None:
            self._runs.free(first)

    def _first(self, kv: torch.Tensor) -> int | None:
        """The first page of a block; None for one that lies loose."""
        if self._memory is None or not kv.numel():
            return None
        start = kv.data_ptr() - self._memory.data_ptr()
        return start // self._page_bytes if 0 <= start < len(self._memory) else None

    def compacted(self, movable: Mapping[K, torch.Tensor]) -> dict[K, torch.Tensor]:
        """Blocks go down, in their order, to where the block before them ends; those that are read stay."""
        keys = {first: key for key, kv in movable.items() if (first := self._first(kv)) is not None}
        moved = dict[K, torch.Tensor]()
        for first, to in self._runs.packed(keys):
            kv = movable[keys[first]]
            moved[keys[first]] = self._view(to, kv.shape).copy_(kv.clone())  # both places may overlap
        return moved

    def check(self, blocks: Iterable[torch.Tensor]) -> None:
        self._runs.check(first for kv in blocks if (first := self._first(kv)) is not None)
