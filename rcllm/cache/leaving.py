"""Published blocks on their way to the store, while what is computed goes on.

    note ──▶ waiting ──begin──▶ copied beside ──land──▶ store

Knows nothing of the pool's budget. Invariants: the store is asked under no lock of this module; memory that `gone` was
told of may be overwritten by whatever the device is given next; nothing of an owner is handed down after `forget`. A
copy that cannot be begun is an error that is counted, and the block is not handed down.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import takewhile

import torch

from rcllm.cache.below import Below, Block
from rcllm.cache.lanes import Copy, Lane
from rcllm.core.ranking import ContentKey
from rcllm.model.arrivals import Mark
from rcllm.store.codec import encoded_bytes, place
from rcllm.store.erasures import Erasures
from rcllm.store.owners import is_among
from rcllm.store.sealed import finish


@dataclass(frozen=True, slots=True)
class _Copied:
    """Blocks that were copied together, or are."""

    blocks: Mapping[ContentKey, tuple[Block, memoryview]]  # and where their sealed bytes are, but for the checksum
    marks: list[Mark]
    erasures: int  # how many owners had been erased when copying began

    @property
    def is_over(self) -> bool:
        return all(mark.query() for mark in self.marks)


class Leaving:
    """Of one pool, and of those beside it."""

    def __init__(self, below: Below, lane: Lane) -> None:
        self._below, self._lane = below, lane
        self._lock = threading.Lock()  # may be taken by whoever has the pool's
        self._sending = threading.Lock()  # of the lane; taken before the other
        self._waiting: dict[ContentKey, Block] = {}
        self._copied: list[_Copied] = []  # in the order in which it began
        self._erasures = Erasures()

    def note(self, key: ContentKey, block: Block) -> None:
        """A block was published."""
        with self._lock:
            self._waiting[key] = block

    def moved(self, key: ContentKey, kv: torch.Tensor) -> None:
        """The same block lies somewhere else now."""
        with self._lock:
            if key in self._waiting:
                self._waiting[key] = replace(self._waiting[key], kv=kv)

    def gone(self, key: ContentKey) -> None:
        """The memory of a block is about to be used anew: copies from it come first."""
        self._send(self._rooms(self._lane.host_room, [key]))
        self.wait(key)

    def wait(self, key: ContentKey | None = None) -> None:
        """What the device is given from here on comes after the copies of one block, or of all."""
        with self._sending, self._lock:
            marks = [mark for each in self._copied if key is None or key in each.blocks for mark in each.marks]
        for mark in marks[-1:]:
            mark.wait()

    def forget(self, owners: Collection[str] | None) -> None:
        """Nothing of some owners, or of anybody, is to be handed down."""
        with self._lock:
            self._erasures.add(owners)
            self._waiting = {k: block for k, block in self._waiting.items() if not is_among(block.owner, owners)}

    def begin(self) -> None:
        """Has what waits copied to where the store takes it from: into its own memory, if it lends any."""
        self._send(self._rooms(lambda count: self._below.room_for(count) or self._lane.host_room(count)))

    def _rooms(
        self, room_for: Callable[[int], memoryview], keys: Iterable[ContentKey] | None = None
    ) -> dict[ContentKey, memoryview]:
        """Memory for those of `keys` that wait, by default for all that do."""
        with self._lock:
            sizes = {
                key: encoded_bytes(self._waiting[key].kv)
                for key in (self._waiting if keys is None else keys)
                if key in self._waiting
            }
        rooms = dict[ContentKey, memoryview]()
        for key, num_bytes in sizes.items():
            try:
                rooms[key] = room_for(num_bytes)
            except RuntimeError:
                self._below.count_errors()
                with self._lock:
                    self._waiting.pop(key, None)
        return rooms

    def _send(self, rooms: Mapping[ContentKey, memoryview]) -> None:
        """Begins to copy those blocks, if they still wait."""
        with self._sending:
            with self._lock:
                blocks = {key: (self._waiting.pop(key), room) for key, room in rooms.items() if key in self._waiting}
                erasures = self._erasures.now
            if not blocks:
                return
            try:
                marks = self._lane.send([[Copy(place(block.kv, room), block.kv) for block, room in blocks.values()]])
            except RuntimeError:
                self._below.count_errors(len(blocks))
                return
            with self._lock:
                self._copied.append(_Copied(blocks, marks, erasures))

    def land(self) -> None:
        """Hands down what has been copied by now; takes back what was erased meanwhile."""
        with self._lock:
            over = list(takewhile(lambda each: each.is_over, self._copied))
            del self._copied[: len(over)]
            blocks = {
                key: (block, data)
                for each in over
                for key, (block, data) in each.blocks.items()
                if not self._erasures.hit(block.owner, each.erasures)
            }
            erasures = self._erasures.now
        self._below.write_many({key: self._below.sealed(finish(data), block) for key, (block, data) in blocks.items()})
        with self._lock:
            erased = {block.owner for block, _ in blocks.values() if self._erasures.hit(block.owner, erasures)}
        for owner in erased:
            assert owner is not None
            self._below.take_back(owner)

    def settle(self) -> None:
        """The same with all of it, waiting for what is still being copied."""
        self.begin()
        with self._lock:
            marks = [mark for each in self._copied for mark in each.marks]
        for mark in marks[-1:]:
            mark.synchronize()
        self.land()
