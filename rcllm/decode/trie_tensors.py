"""Tries of catalogues, and what requests are allowed, on the device that searches them: sent once, kept while in use.

Knows nothing of scores. Invariant: what is kept belongs to an epoch of a catalogue, or to a filter, that somebody still
holds. So it goes when the last search of that epoch has ended, and nothing has to be told of changes.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
import torch

from rcllm.codes.allowed import Allowed
from rcllm.codes.index import CodeIndex
from rcllm.core.ranking import IntArray
from rcllm.model.upload import upload


@dataclass(frozen=True, slots=True)
class TrieLevel:
    """The children of a level's nodes, in CSR form as in `codes.trie`."""

    first: torch.Tensor  # [nodes + 1], int32
    code: torch.Tensor  # [nodes of the next level], int32
    offsets: torch.Tensor  # [width], int64, 0 to the most children of a node

    @property
    def width(self) -> int:
        return len(self.offsets)

    @property
    def num_bytes(self) -> int:
        return self.first.nbytes + self.code.nbytes + self.offsets.nbytes


@dataclass(frozen=True, slots=True, eq=False)
class Filter:
    """Which nodes lead to an allowed item."""

    alive: tuple[torch.Tensor, ...]  # per level from the root's children on: [nodes], bool
    num_alive: tuple[int, ...]  # per level from the root's children on

    @property
    def num_bytes(self) -> int:
        return sum(alive.nbytes for alive in self.alive)


class TrieTensors:
    """Of all catalogues and filters that are searched on one device. Safe to call from several threads."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._lock = device, threading.Lock()
        self._tries = WeakKeyDictionary[CodeIndex, tuple[TrieLevel, ...]]()
        self._filters = WeakKeyDictionary[Allowed, Filter]()

    @property
    def num_bytes(self) -> int:
        """On the device: at most 8 for each node of a trie, and 1 for each of a filter."""
        with self._lock:
            tries = sum(level.num_bytes for levels in self._tries.values() for level in levels)
            return tries + sum(some.num_bytes for some in self._filters.values())

    def levels(self, code_index: CodeIndex) -> tuple[TrieLevel, ...]:
        """Per level but that of the leaves."""
        with self._lock:
            if code_index not in self._tries:
                trie = code_index.trie
                self._tries[code_index] = tuple(map(self._level, trie.first, trie.code))
            return self._tries[code_index]

    def _level(self, first: IntArray, code: IntArray) -> TrieLevel:
        offsets = torch.arange(int(np.diff(first).max(initial=0)), device=self._device)
        return TrieLevel(upload(first, self._device), upload(code, self._device), offsets)

    def filter(self, allowed: Allowed) -> Filter:
        with self._lock:
            if allowed not in self._filters:
                below = allowed.nodes[1:]
                alive = upload(np.concatenate(below), self._device).split([len(nodes) for nodes in below])
                self._filters[allowed] = Filter(tuple(alive), tuple(int(np.count_nonzero(nodes)) for nodes in below))
            return self._filters[allowed]
