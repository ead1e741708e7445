"""Where the pool's blocks lie: each in memory of its own, or all of them in one tensor that is cut into pages.

    |■■■■■■|···|■■|·······|■■■■|···|       runs of pages: a block's, or free; free runs beside each other are one

One tensor is taken from the device once, so that what is evicted and what comes next cannot leave it in fragments that
nobody can use. Knows nothing of keys or budgets. Invariant: runs do not overlap, and whoever frees a block no longer
reads it.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from typing import Protocol, TypeVar

import torch

from rcllm.model.kv_int8 import kept, kept_bytes, quantise

K = TypeVar("K", bound=Hashable)
PAGE_BYTES = 256 << 10


class Room(Protocol):
    """Memory on one device for blocks in one dtype."""

    reuses: bool  # whether what is freed is overwritten, though somebody may still have the tensor

    def num_bytes(self, kv: torch.Tensor) -> int:
        """What a block takes, once it is put here."""

    def put(self, kv: torch.Tensor) -> torch.Tensor | None:
        """A copy of the block; None where no run of pages is long enough."""

    def free(self, kv: torch.Tensor) -> None:
        """Takes back what `put` gave."""

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

    def put(self, kv: torch.Tensor) -> torch.Tensor:
        return kept(kv, self._dtype, self._device)

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
        self.num_pages = num_bytes // page_bytes
        self._memory: torch.Tensor | None = None
        self._used: dict[int, int] = {}  # first page of each block → its pages
        self._free = {0: self.num_pages}  # first page of each free run → its pages

    def num_bytes(self, kv: torch.Tensor) -> int:
        return self._pages(kept_bytes(kv, self._dtype)) * self._page_bytes

    def _pages(self, num_bytes: int) -> int:
        return -(-num_bytes // self._page_bytes)

    def put(self, kv: torch.Tensor) -> torch.Tensor | None:
        if not kv.numel():
            return kept(kv, self._dtype, self._device)
        count = self._pages(kept_bytes(kv, self._dtype))
        fitting = [(length, first) for first, length in self._free.items() if length >= count]
        if not fitting:
            return None
        length, first = min(fitting)  # the shortest that fits
        del self._free[first]
        if length > count:
            self._free[first + count] = length - count
        self._used[first] = count
        source = quantise(kv) if self._dtype == torch.int8 and kv.dtype != torch.int8 else kv.to(self._dtype)
        if source.device.type == "cpu" and self._device.type == "cuda":
            source = source.pin_memory()  # so that nothing waits: the next block is pinned while this one is copied
        return self._view(first, source).copy_(source, non_blocking=True)

    def _view(self, first: int, like: torch.Tensor) -> torch.Tensor:
        """The pages from `first` on as a block of the shape and dtype of another."""
        if self._memory is None:
            self._memory = torch.empty(self.num_pages * self._page_bytes, dtype=torch.uint8, device=self._device)
        start = first * self._page_bytes
        return self._memory[start : start + like.numel() * like.element_size()].view(like.dtype).view(like.shape)

    def free(self, kv: torch.Tensor) -> None:
        first = self._first(kv)
        if first is None:
            return
        length = self._used.pop(first)
        after = first + length
        if after in self._free:
            length += self._free.pop(after)
        before = next((start for start, pages in self._free.items() if start + pages == first), None)
        if before is not None:
            first, length = before, length + self._free.pop(before)
        self._free[first] = length

    def _first(self, kv: torch.Tensor) -> int | None:
        """The first page of a block; None for one that lies loose."""
        if self._memory is None or not kv.numel():
            return None
        start = kv.data_ptr() - self._memory.data_ptr()
        return start // self._page_bytes if 0 <= start < len(self._memory) else None

    def compacted(self, movable: Mapping[K, torch.Tensor]) -> dict[K, torch.Tensor]:
        """Blocks go down, in their order, to where the block before them ends; those that are read stay."""
        keys = {first: key for key, kv in movable.items() if (first := self._first(kv)) is not None}
        moved, end = dict[K, torch.Tensor](), 0
        for first, length in sorted(self._used.items()):
            if first in keys and end < first:
                kv = movable[keys[first]]
                moved[keys[first]] = self._view(end, kv).copy_(kv.clone())  # both places may overlap
                self._used[end] = self._used.pop(first)
                first = end
            end = first + length
        self._free, end = {}, 0
        for first, length in [*sorted(self._used.items()), (self.num_pages, 0)]:
            if end < first:
                self._free[end] = first - end
            end = first + length
        return moved

    def check(self, blocks: Iterable[torch.Tensor]) -> None:
        firsts = {first for kv in blocks if (first := self._first(kv)) is not None}
        runs = sorted([*self._used.items(), *self._free.items()])
        numbers = f"used {sorted(self._used.items())}, free {sorted(self._free.items())}, blocks at {sorted(firsts)}"
        assert firsts == set(self._used), numbers
        assert all(a + n == b for (a, n), (b, _) in zip(runs, [*runs[1:], (self.num_pages, 0)], strict=True)), numbers
        assert not {first + n for first, n in self._free.items()} & self._free.keys(), f"free runs touch: {numbers}"
