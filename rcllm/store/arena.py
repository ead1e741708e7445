"""One piece of host memory for blocks as bytes, cut into runs of pages: taken once, page-locked where a GPU copies.

Knows nothing of keys or budgets. Never imports torch. Invariant: a run is free again when nobody has its bytes any
more, so that what is evicted while it is copied or written stays what it is.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from rcllm.store.runs import Runs

PAGE_BYTES = 64 << 10


class Lent(np.ndarray[Any, np.dtype[np.uint8]]):
    """Bytes of an arena, whose run ends with the last reference to them."""

    arena: Arena


class Arena:
    """`memory`, of bytes. Not thread-safe, but bytes may end in any thread."""

    def __init__(self, memory: npt.NDArray[np.uint8], page_bytes: int = PAGE_BYTES) -> None:
        self._memory, self._page_bytes = memory, page_bytes
        self._runs = Runs(len(memory) // page_bytes)
        self._ended = deque[int]()  # runs that nobody has any more; a finalizer may run within `take`

    @property
    def num_bytes(self) -> int:
        return len(self._memory)

    def take(self, num_bytes: int) -> memoryview | None:
        """Uninitialised bytes; None where no free run is long enough."""
        self._collect()
        first = self._runs.take(max(1, -(-num_bytes // self._page_bytes)))
        if first is None:
            return None
        start = first * self._page_bytes
        lent = self._memory[start : start + num_bytes].view(Lent)
        lent.arena = self
        weakref.finalize(lent, self._ended.append, first).atexit = False
        return lent.data

    def has_lent(self, data: memoryview) -> bool:
        """Whether these are bytes that `take` gave."""
        return isinstance(data.obj, Lent) and data.obj.arena is self

    def _collect(self) -> None:
        while self._ended:
            self._runs.free(self._ended.popleft())

    def check(self, blocks: Iterable[memoryview]) -> None:
        """Asserts that no other bytes are lent."""
        self._collect()
        start = self._memory.ctypes.data
        self._runs.check((np.frombuffer(data, np.uint8).ctypes.data - start) // self._page_bytes for data in blocks)
