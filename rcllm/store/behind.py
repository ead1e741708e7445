"""Writing behind: blocks wait in a bounded queue for one thread, which hands them to a function in batches.

Knows nothing of tiers. Invariants: nobody waits for the writer but `flush`, `between_batches` and `close`; a block can
be read from here until it was written; blocks that wait or are being written have at most `budget` bytes.

    add_many → waiting —batch→ writing —written→ gone
                  └─ no room: dropped, counted
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from rcllm.core.ranking import ContentKey
from rcllm.store.contract import Stored
from rcllm.store.owners import is_among

BATCH_BYTES = 32 << 20  # written at once: enough to spread the cost of a transaction, and little to wait for


@dataclass(frozen=True, slots=True)
class Waiting:
    """A block, and whom it is for."""

    block: Stored
    num_tiers: int  # so many of the lasting tiers are to have it, from the nearest
    anew: bool  # put by the caller, so it replaces what a tier has; otherwise it is for those that lack it


Batch = Mapping[ContentKey, Waiting]


class WriteBehind:
    """At most `budget` bytes wait for `write`, which must not raise. The thread starts with the first block."""

    def __init__(self, write: Callable[[Batch], None], budget: int) -> None:
        self._write = write
        self._budget = budget
        self._changed = threading.Condition()
        self._waiting: dict[ContentKey, Waiting] = {}  # the oldest first
        self._writing: dict[ContentKey, Waiting] = {}
        self._num_bytes = 0  # of both
        self._dropped: Counter[int] = Counter()  # blocks, by the place of the tier that did not get them
        self._holds = 0
        self._closing = False
        self._thread: threading.Thread | None = None

    @property
    def num_bytes(self) -> int:
        return self._num_bytes

    @property
    def unfilled_bytes(self) -> int:
        """Of blocks that there is room for."""
        return self._budget - self._num_bytes

    def dropped(self, tier: int) -> int:
        """Blocks that there was no room for, and which were meant for a tier."""
        return self._dropped[tier]

    def add_many(self, batch: Batch) -> None:
        """Takes what there is room for. What is put anew takes the place of what waits under its key."""
        with self._changed:
            for key, waiting in batch.items():
                self._add(key, waiting)
            if self._waiting and self._thread is None:
                self._thread = threading.Thread(target=self._run, name="rcllm-store-writer", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def _add(self, key: ContentKey, waiting: Waiting) -> None:
        if not waiting.anew and (key in self._waiting or key in self._writing):
            return
        if (older := self._waiting.pop(key, None)) is not None:
            self._num_bytes -= older.block.num_bytes
        if self._num_bytes + waiting.block.num_bytes > self._budget:
            self._dropped.update(range(waiting.num_tiers))
            return
        self._waiting[key] = waiting
        self._num_bytes += waiting.block.num_bytes

    def get_many(self, keys: Iterable[ContentKey]) -> dict[ContentKey, Stored]:
        """Those of `keys` that are not written yet, as they were put last."""
        with self._changed:
            found = {key: self._waiting.get(key) or self._writing.get(key) for key in keys}
        return {key: waiting.block for key, waiting in found.items() if waiting is not None}

    def forget(self, owners: Collection[str] | None) -> int:
        """Removes what waits of some owners, or of everybody; returns how many.

        What is being written is so until `between_batches`.
        """
        with self._changed:
            owned = [key for key, waiting in self._waiting.items() if is_among(waiting.block.owner, owners)]
            for key in owned:
                self._num_bytes -= self._waiting.pop(key).block.num_bytes
            self._changed.notify_all()
            return len(owned)

    @contextmanager
    def between_batches(self) -> Iterator[None]:
        """A scope in which nothing is being written."""
        with self._changed:
            self._holds += 1
            self._changed.wait_for(lambda: not self._writing)
        try:
            yield
        finally:
            with self._changed:
                self._holds -= 1
                self._changed.notify_all()

    def flush(self) -> None:
        """Waits until nothing waits and nothing is being written."""
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting and not self._writing)

    def close(self) -> None:
        """Writes what waits, and ends the thread, which must not call this."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def is_writer(self) -> bool:
        """Whether it is the writer that asks."""
        return self._thread is threading.current_thread()

    def check(self) -> None:
        """Asserts the invariant."""
        with self._changed:
            total = sum(waiting.block.num_bytes for waiting in (*self._waiting.values(), *self._writing.values()))
            numbers = f"{self._num_bytes} bytes noted, {total} there, budget {self._budget}, {len(self._waiting)} wait"
            assert self._num_bytes == total <= self._budget, numbers
            assert self._holds >= 0, numbers

    # ---- the writer ----

    def _run(self) -> None:
        while self._begin():
            self._write(self._writing)
            with self._changed:
                self._num_bytes -= sum(waiting.block.num_bytes for waiting in self._writing.values())
                self._writing = {}
                self._changed.notify_all()

    def _begin(self) -> bool:
        """Waits for the next batch, the oldest blocks that wait; false when it is time to end."""
        with self._changed:
            self._changed.wait_for(lambda: not self._holds and (self._waiting or self._closing))
            num_bytes = 0
            for key, waiting in self._waiting.items():
                num_bytes += waiting.block.num_bytes
                if self._writing and num_bytes > BATCH_BYTES:
                    break
                self._writing[key] = waiting
            for key in self._writing:
                del self._waiting[key]
            return bool(self._writing)
