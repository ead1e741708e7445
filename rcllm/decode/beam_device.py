"""Chooses beams on the device that computes them: a whole search is launched without waiting, and read at its end.

A request has `min(beam, allowed nodes)` beams at every level, for each allowed node leads to an allowed child: so the
host knows all shapes beforehand. Children are padded to the most that a node of the level has, and sorted for all
requests at once. Where scores are not numbers the request goes on with any beams, and its error is found at the end.
Knows nothing of passes. Invariant: leaves and order are those of `beam_host`, its twin; scores, to rounding.
Source: xGR (arXiv 2512.11529), item filtering on the device. Its early end is left out: all children are sorted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from rcllm.codes.index import CodeTokens
from rcllm.core.ranking import IntArray
from rcllm.core.receipts import BeamStep
from rcllm.decode.beam_task import BeamTask, FloatArray, Leaves, Rows
from rcllm.decode.finite import not_numbers
from rcllm.decode.trie_tensors import Filter, TrieTensors
from rcllm.model.upload import upload

Counts = npt.NDArray[np.int64]
_MISSING = -(1 << 31)  # in the order of scores, below minus infinity
_APART = 1 << 32  # between the keys of two requests: those of one differ by less


class OnDevice:
    """A `Choosing` for a device that the host should not wait for."""

    def __init__(self, tokens: CodeTokens, device: torch.device) -> None:
        self.columns = [upload(ids.astype(np.int64), device) for ids in tokens.ids]
        self._tries = TrieTensors(device)

    @property
    def device_bytes(self) -> int:
        return self._tries.num_bytes

    def begin(self, tasks: Sequence[BeamTask]) -> DeviceChoice:
        return DeviceChoice(tasks, self.columns, self._tries)


class _Children(NamedTuple):
    """Of the beams of all requests, padded."""

    nodes: torch.Tensor  # [rows, width], int64, of the next level
    codes: torch.Tensor  # [rows, width], int64
    may_come: torch.Tensor  # [rows, width], bool: no padding, and allowed
    num_all: torch.Tensor  # [rows], of the catalogue


class _Places(NamedTuple):
    """Where things are when the children of all requests are sorted; int64."""

    best: torch.Tensor  # [rows of the next level], in the order of keys, request by request
    keys: torch.Tensor  # [rows], what those of the request of a row are counted from
    by_vocabulary: torch.Tensor  # [rows], 1 where the rule is `mask`


class DeviceChoice:
    """A `Choice` in torch, by steps whose shapes depend on no score."""

    def __init__(self, tasks: Sequence[BeamTask], columns: Sequence[torch.Tensor], tries: TrieTensors) -> None:
        epochs = {task.code_index for task in tasks}
        assert len(epochs) == 1, "requests of one search see one epoch"
        self._tasks, self._columns, self._device = tasks, columns, columns[0].device
        self._trie = tries.levels(epochs.pop())
        self._filters = [None if task.allowed is None else tries.filter(task.allowed) for task in tasks]
        self._widths = _widths(tasks, self._filters)  # per level: [requests]
        self._level = 0  # of the beams
        self._nodes = torch.zeros(len(tasks), dtype=torch.int64, device=self._device)  # [rows]
        self._scores = torch.zeros(len(tasks), device=self._device)  # [rows]
        self._parents = self._codes = self._nodes  # [rows]
        self._told: list[torch.Tensor] = []  # per level [rows, 3]: children that may come, of all, with wrong scores

    @property
    def num_rows(self) -> Sequence[int]:
        counts: list[int] = self._widths[self._level].tolist()
        return counts

    def expand(self) -> None:
        level = self._trie[self._level]
        starts, stops = level.first[self._nodes], level.first[self._nodes + 1]
        nodes = starts[:, None] + level.offsets
        may_come = nodes < stops[:, None]
        nodes.clamp_(max=len(level.code) - 1)
        for rows, some in self._filtered():
            may_come[rows] &= some.alive[self._level][nodes[rows]]
        self._children = _Children(nodes, level.code[nodes].long(), may_come, stops - starts)
        self._places = self._sent_places(level.width)

    def _filtered(self) -> Iterator[tuple[slice, Filter]]:
        """Rows that follow each other and have the same filter."""
        start = 0
        for some, run in groupby(zip(self._filters, self.num_rows, strict=True), key=itemgetter(0)):
            stop = start + sum(count for _, count in run)
            if some is not None:
                yield slice(start, stop), some
            start = stop

    def _sent_places(self, width: int) -> _Places:
        rows, kept = self._widths[self._level], self._widths[self._level + 1]
        starts = (np.cumsum(rows) - rows) * width
        best = [np.arange(start, start + count) for start, count in zip(starts, kept, strict=True)]
        keys, rules = np.arange(len(rows)) * _APART, np.array([task.rule == "mask" for task in self._tasks])
        table = np.concatenate([*best, np.repeat(keys, rows), np.repeat(rules, rows)])
        return _Places(*upload(table, self._device).split([int(kept.sum()), *[int(rows.sum())] * 2]))

    def choose(self, logits: torch.Tensor, lse: torch.Tensor | None) -> None:
        (nodes, codes, may_come, num_all), places = self._children, self._places
        given = logits.gather(1, codes).masked_fill(~may_come, -math.inf)
        scores = torch.log_softmax(given, dim=-1)
        if lse is not None:
            scores = torch.where(places.by_vocabulary[:, None] > 0, given - lse[:, None], scores)
        scores = scores + self._scores[:, None]
        wrong = scores.isnan() & may_come
        scores = scores.masked_fill(wrong, -math.inf)
        order = (places.keys[:, None] - rising(scores, may_come)).flatten().sort(stable=True).indices
        chosen = order[places.best].sort().values  # of the flat [rows, width]
        counts = may_come.sum(-1), num_all, wrong.sum(-1)
        self._told.append(torch.stack([each.int() for each in counts], dim=1))
        self._parents = chosen // max(1, nodes.shape[1])
        self._nodes, self._codes, self._scores = (each.flatten()[chosen] for each in (nodes, codes, scores))
        self._level += 1

    @property
    def rows(self) -> Rows:
        return Rows(self._parents, self._columns[self._level - 1][self._codes])

    def found(self) -> list[Leaves]:
        """By one copy to the host, which waits for the search."""
        parts = [self._nodes.int(), self._scores.view(torch.int32), *(told.flatten() for told in self._told)]
        read = torch.cat(parts).cpu().numpy()
        nodes, scores, *told = np.split(read, np.cumsum([len(part) for part in parts])[:-1])
        counts = [_per_request(each.reshape(-1, 3), rows) for each, rows in zip(told, self._widths, strict=False)]
        cuts = np.cumsum(self.num_rows)[:-1]
        ends = zip(np.split(nodes, cuts), np.split(scores.view(np.float32), cuts), strict=True)
        return [self._leaves(number, *each, counts) for number, each in enumerate(ends)]

    def _leaves(self, number: int, nodes: IntArray, scores: FloatArray, counts: Sequence[Counts]) -> Leaves:
        """counts: per level [requests, 3]."""
        steps = list[BeamStep]()
        for level, table in enumerate(counts):
            num_parents, num_kept = (int(self._widths[each][number]) for each in (level, level + 1))
            num_children, num_all, num_wrong = table[number].tolist()
            if num_wrong:
                return Leaves.none(steps, not_numbers())
            if num_parents:
                steps.append(BeamStep(num_parents, num_children, num_kept, num_all - num_children, num_skipped=0))
        return Leaves.of(nodes, scores, steps) if len(steps) == len(self._trie) else Leaves.none(steps)


def _widths(tasks: Sequence[BeamTask], filters: Sequence[Filter | None]) -> list[Counts]:
    """Per level, the beams of each request."""
    counts = [
        task.code_index.trie.num_nodes if some is None else (1, *some.num_alive)
        for task, some in zip(tasks, filters, strict=True)
    ]
    beams = np.array([min(task.beam, max(nodes)) for task, nodes in zip(tasks, counts, strict=True)])
    return [np.minimum(beams, nodes) for nodes in np.array(counts, np.int64).T]


def _per_request(told: IntArray, rows: Counts) -> Counts:
    """Sums of `told` [rows of all requests, n]; [requests, n]."""
    sums = np.concatenate([np.zeros((1, told.shape[1]), np.int64), np.cumsum(told, axis=0)])
    ends = np.cumsum(rows)
    counts: Counts = sums[ends] - sums[ends - rows]
    return counts


def rising(scores: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
    """Whole numbers in the order of fp32 `scores`, equal where those are; what is not `there` comes first. int64."""
    bits = (scores + 0.0).view(torch.int32)  # -0 is 0
    return torch.where(there, torch.where(bits < 0, bits ^ 0x7FFF_FFFF, bits), _MISSING).long()
