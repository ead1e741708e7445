"""Copies between the host and the pool's device: at once, or on a stream of their own, beside what is computed.

Knows nothing of blocks or keys. Invariants: copies begin after all that the device was given before, and end in the
order of their parts; what a copy reads and writes stays alive until it has ended.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch

from rcllm.cache.rates import Rate
from rcllm.model.arrivals import Mark

PARTS = 6  # that layers are copied in: each costs a call a block, and a pass waits for a sixth of its KV at most


@dataclass(frozen=True, slots=True)
class Copy:
    to: torch.Tensor
    source: torch.Tensor  # of the same shape and dtype; both contiguous


class Lane(Protocol):
    """One row of copies. Not thread-safe."""

    num_parts: int  # that the layers of what arrives are best cut into

    def ready(self, source: torch.Tensor) -> torch.Tensor:
        """The same numbers where a copy of them lets nobody wait. Raises RuntimeError where there is no memory."""

    def host_room(self, num_bytes: int) -> memoryview:
        """Memory of the host that copies end in, without letting anybody wait. Raises RuntimeError as well."""

    def send(self, parts: Sequence[Sequence[Copy]]) -> list[Mark]:
        """Begins copies, and returns a mark behind each part; none where they have ended already.

        Raises RuntimeError, with none of them under way, where one cannot be begun.
        """


class AtOnce:
    """Copies that have ended when `send` returns: on the CPU."""

    num_parts = 1

    def ready(self, source: torch.Tensor) -> torch.Tensor:
        return source

    def host_room(self, num_bytes: int) -> memoryview:
        return memoryview(bytearray(num_bytes))

    def send(self, parts: Sequence[Sequence[Copy]]) -> list[Mark]:
        for part in parts:
            for copy in part:
                copy.to.copy_(copy.source)
        return []


class Beside:
    """On a CUDA stream of its own, from and to page-locked memory."""

    num_parts = PARTS

    def __init__(self, device: torch.device, rate: Rate | None = None) -> None:
        """rate: told how fast copies are."""
        self._device, self._rate = device, rate
        self._under_way = deque[_UnderWay]()

    @cached_property
    def _stream(self) -> Any:
        return torch.cuda.Stream(self._device)

    def ready(self, source: torch.Tensor) -> torch.Tensor:
        return source if source.is_pinned() else source.pin_memory()

    def host_room(self, num_bytes: int) -> memoryview:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True).numpy().data

    def send(self, parts: Sequence[Sequence[Copy]]) -> list[Mark]:
        self._forget_ended()
        stream, begin = self._stream, torch.cuda.Event(enable_timing=True)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        begin.record(stream)
        marks = list[Any]()
        try:
            with torch.cuda.stream(stream):
                for part in parts:
                    for copy in part:
                        copy.to.copy_(copy.source, non_blocking=True)
                    marks.append(torch.cuda.Event(enable_timing=True))
                    marks[-1].record(stream)
        except BaseException:
            stream.synchronize()
            raise
        self._under_way.append(_UnderWay(begin, marks[-1], parts))
        return marks

    def _forget_ended(self) -> None:
        while self._under_way and self._under_way[0].end.query():
            over = self._under_way.popleft()
            if self._rate is not None:
                self._rate.saw(over.num_bytes, over.begin.elapsed_time(over.end) / 1e3)


@dataclass(frozen=True, slots=True)
class _UnderWay:
    begin: Any  # torch.cuda.Event
    end: Any
    parts: Sequence[Sequence[Copy]]  # keeps alive what is read and written

    @property
    def num_bytes(self) -> int:
        return sum(copy.to.nbytes for part in self.parts for copy in part)


@dataclass(frozen=True, slots=True)
class Lanes:
    """Of one device."""

    up: Lane  # to it
    down: Lane  # from it


def lanes_of(device: torch.device, rate: Rate | None) -> Lanes:
    """rate: told how fast copies to a GPU are."""
    if device.type == "cuda":
        return Lanes(Beside(device, rate), Beside(device))
    return Lanes(AtOnce(), AtOnce())
