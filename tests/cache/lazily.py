"""A lane whose copies happen when they are waited for, and not before: what goes on too early reads ones in every bit.

That is the latest that a stream may be. With a generator, some of them happen earlier, at any call, as on a stream
that is quick. Within a part copies are in any order, as nothing may count on one. Knows nothing of pools.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import torch

from rcllm.cache.below import Block
from rcllm.cache.lanes import Copy, Lanes
from rcllm.cache.pool import Pool
from rcllm.model.arrivals import Mark


class Lazily:
    """`refuses`: of the next calls, how many fail as where there is no memory."""

    def __init__(self, rng: Random | None = None, num_parts: int = 2) -> None:
        self.num_parts = num_parts
        self.refuses = 0
        self._rng = rng
        self._parts: list[Sequence[Copy]] = []
        self.done = 0  # of the parts

    @property
    def num_left(self) -> int:
        return len(self._parts) - self.done

    def ready(self, source: torch.Tensor) -> torch.Tensor:
        self._call()
        return source

    def host_room(self, num_bytes: int) -> memoryview:
        self._call()
        return memoryview(bytearray(num_bytes))

    def send(self, parts: Sequence[Sequence[Copy]]) -> list[Mark]:
        self._call()
        for part in parts:
            for copy in part:
                assert copy.to.shape == copy.source.shape
                assert copy.to.dtype == copy.source.dtype
                assert copy.to.is_contiguous()
                assert copy.source.is_contiguous()
                copy.to.view(torch.uint8).fill_(255)  # NaN in every float, and in the scales of int8
        first = len(self._parts)
        self._parts += parts
        return [_Mark(self, first + number) for number in range(len(parts))]

    def run(self, count: int) -> None:
        """Lets the first `count` parts end."""
        for part in self._parts[self.done : count]:
            for copy in reversed(part):
                copy.to.copy_(copy.source)
        self.done = max(self.done, min(count, len(self._parts)))

    def _call(self) -> None:
        self.some()
        if self.refuses:
            self.refuses -= 1
            raise RuntimeError("out of memory, for a test")

    def some(self) -> None:
        """Time goes by."""
        if self._rng is not None:
            self.run(self.done + self._rng.choice((0, 0, 1, 3)))


@dataclass(frozen=True, slots=True)
class _Mark:
    lane: Lazily
    number: int

    def wait(self) -> None:
        self.lane.run(self.number + 1)

    def query(self) -> bool:
        self.lane.some()
        return self.lane.done > self.number

    def synchronize(self) -> None:
        self.wait()


class Elsewhere(Pool):
    """A pool that reads nothing where the store keeps it, as if it were on another device."""

    def _readable_in_place(self, block: Block) -> bool:
        return False


def lazy_lanes(rng: Random | None = None) -> Lanes:
    return Lanes(Lazily(rng), Lazily(rng, num_parts=1))
