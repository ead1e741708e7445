"""Many rows on a GPU: the keys of a group are laid side by side once for each layer, turned, then attended to.

    group      keys in the prompt's order: cached segments and fresh rows alike ───▶ scratch [KV heads, keys, D]
    row tile   sees whole tiles from the first key on, then visits those that any of its rows sees

Every key is read and turned once however many rows see it, and tiles are full, wherever segments end. That costs
writing the keys once, so few rows read them in place instead (`triton_in_place.py`). Invariant: every key that a row
sees is in exactly one task of its row tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from rcllm.late import Late
from rcllm.model.attend.segments import Group
from rcllm.model.attend.triton_in_place import key_tiles
from rcllm.model.attend.triton_tables import (
    KINDS,
    IntTable,
    Shape,
    Tiling,
    divided,
    interpreting,
    padded,
    shape_of,
    slots_of,
)
from rcllm.model.attend.triton_way import Way, head_constants, reading_constants, row_constants
from rcllm.model.rope import Rope
from rcllm.model.spec import ModelSpec

_KERNELS = Late("rcllm.model.attend.triton_laid_kernels")  # triton is optional
_FRESH = len(KINDS)  # the kind of keys that are rows of the pass
_TOKENS = 64  # that one program lays


def tiling_of(dtype: torch.dtype, cores: int) -> Tiling:
    """The tiles that were quickest on an H200, for one ranking and for many: two of them share a core."""
    if interpreting():  # which takes its time for each program, however much that computes
        return Tiling(256, 64, 2 * cores)
    if dtype == torch.float32:
        return Tiling(32, 32, 2 * cores)
    return Tiling(64, 64, 2 * cores)


@dataclass(frozen=True, slots=True)
class LaidShape:
    """What the kernels are compiled for, and how long each table is."""

    tiling: Tiling
    kinds: int  # bits of the dtypes of cached KV
    tiles: int
    tasks: int
    visits: int
    rows: int
    keys: int
    told: int  # keys whose blocks are told: all, or none where every row sees all before it
    merges: int
    bits: int
    slots: int

    def rounded(self, rows: int) -> LaidShape:
        """For all passes of about this size, of at most `rows` rows. Longer tables cost little, more tasks some."""
        tasks, merges = max(32, padded(self.tasks)), padded(max(1, self.merges))
        tiles, visits, keys = max(64, padded(self.tiles)), max(512, padded(self.visits)), max(1024, padded(self.keys))
        told = keys if self.told else 0
        return LaidShape(
            self.tiling, self.kinds, tiles, tasks, visits, rows, keys, told, merges, padded(self.bits), slots=tasks
        )

    @property
    def tables(self) -> tuple[Shape, ...]:
        """In the order in which they are sent."""
        ints = ((self.tasks, 16), (self.visits,), (self.rows, 4), (self.told, 2), (self.merges, 4))
        return (
            shape_of(np.int64, self.tiles, 6),
            *(shape_of(np.int32, *shape) for shape in ints),
            shape_of(np.uint8, self.bits),
        )

    def on(self, spec: ModelSpec, rope: Rope) -> Laid:
        return Laid(spec, rope, self)


class Order(NamedTuple):
    """Where the keys of one group lie, in the order of blocks and of places within them."""

    segments: IntTable  # [segments], the first key of each
    rows: IntTable  # [rows], each row's own
    blocks: IntTable  # [blocks], the first key of each
    counts: IntTable  # [blocks], keys of each
    firsts: IntTable  # [runs of rows], rows whose keys do not follow the row before
    lengths: IntTable  # [runs of rows]
    runs: IntTable  # [runs, 3], of all keys that follow each other, in order: block, first offset, keys

    @classmethod
    def of(cls, group: Group) -> Order:
        cached = np.array([(s.block, s.start, s.stop - s.start) for s in group.segments], np.int64).reshape(-1, 3)
        block, offset = group.block.astype(np.int64), group.offset.astype(np.int64)
        starts_run = np.ones(len(block), np.bool_)
        starts_run[1:] = (block[1:] != block[:-1]) | (offset[1:] != offset[:-1] + 1)
        firsts = np.flatnonzero(starts_run)
        lengths = np.append(firsts[1:], len(block)) - firsts
        runs = np.concatenate([cached, np.stack([block[firsts], offset[firsts], lengths], axis=1)])
        order = np.lexsort((runs[:, 1], runs[:, 0]))
        ordered = runs[order]
        place = np.empty(len(runs), np.int64)
        place[order] = np.cumsum(ordered[:, 2]) - ordered[:, 2]
        counts = np.bincount(runs[:, 0], weights=runs[:, 2], minlength=len(group.sees)).astype(np.int64)
        rows = np.repeat(place[len(cached) :] - firsts, lengths) + np.arange(len(block))
        return cls(place[: len(cached)], rows, np.cumsum(counts) - counts, counts, firsts, lengths, ordered)

    @property
    def num_keys(self) -> int:
        return int(self.runs[:, 2].sum())

    def keys(self) -> IntTable:
        """[keys, 2]: block and offset of each."""
        of, within = _within(self.runs[:, 2])
        return np.stack([self.runs[of, 0], self.runs[of, 1] + within], axis=1)


def _within(lengths: IntTable) -> tuple[IntTable, IntTable]:
    """For each of all elements of runs its run, and its place in it."""
    of = np.repeat(np.arange(len(lengths)), lengths)
    return of, np.arange(len(of)) - np.repeat(np.cumsum(lengths) - lengths, lengths)


class LaidTables:
    """The tables of some groups of a pass in numpy."""

    def __init__(self, spec: ModelSpec, groups: Sequence[Group], starts: Sequence[int], tiling: Tiling) -> None:
        """starts: the first row of each group in the pass."""
        self._kinds = self._num_keys = self._num_visits = self._num_bits = 0
        self._is_dense, self._orders = True, list[Order]()  # dense: every row sees all keys before its own
        end = starts[-1] + groups[-1].num_rows
        self._rows = np.zeros((end, 4), np.int64)
        parts = [
            self._add(group, start, tiling, tiling.rows(spec)) for group, start in zip(groups, starts, strict=True)
        ]
        self._tiles, self._visits, self._bits, row_tiles = (
            np.concatenate([part[i] for part in parts]) for i in range(4)
        )
        self._keys = np.zeros((0, 2), np.int64)
        if self._is_dense:
            self._bits = self._bits[:0]
        else:
            self._keys = np.concatenate([order.keys() for order in self._orders])
        self._divide(row_tiles, spec.num_kv_heads, tiling)
        lengths = (len(self._tiles), len(self._tasks), len(self._visits), end, self._num_keys, len(self._keys))
        self.shape = LaidShape(tiling, self._kinds, *lengths, len(self._merges), len(self._bits), slots=self._num_slots)

    def arrays(self, anchor: int) -> list[npt.NDArray[np.generic]]:
        tiles = self._tiles.copy()
        tiles[tiles[:, 5] != _FRESH, 0] -= anchor
        return [tiles, self._tasks, self._visits, self._rows, self._keys, self._merges, self._bits]

    def _add(
        self, group: Group, start: int, tiling: Tiling, tile_rows: int
    ) -> tuple[IntTable, IntTable, npt.NDArray[np.uint8], IntTable]:
        """tiles to lay [tiles, 6], visits, bits, and row tiles [row tiles, 16] as tasks.

        In place of a slot a row tile has its number of visits.
        """
        order, key_start = Order.of(group), self._num_keys
        self._rows[start : start + group.num_rows, :3] = np.column_stack(
            [group.block, group.offset, order.rows + 1 + key_start]
        )
        firsts = np.arange(0, group.num_rows, tile_rows)
        row_tiles = np.zeros((len(firsts), 16), np.int64)
        row_tiles[:, 0] = firsts + start
        row_tiles[:, 1] = np.minimum(firsts + tile_rows, group.num_rows) - firsts

        seen_to = _seen_whole(group, order)
        whole = np.minimum.reduceat(seen_to, firsts) // tiling.keys
        last = np.maximum.reduceat(order.rows, firsts) + 1
        is_dense = bool((seen_to == order.rows + 1).all())
        visited = _visited(group, order, firsts, whole, last, tiling.keys, is_dense)
        row_tiles[:, 2], row_tiles[:, 3] = key_start, key_start + whole * tiling.keys
        counts = visited.sum(axis=1)
        row_tiles[:, 4] = np.cumsum(counts) - counts + self._num_visits
        row_tiles[:, 5] = row_tiles[:, 4] + counts
        row_tiles[:, 6] = last + key_start
        row_tiles[:, 7], row_tiles[:, 8], row_tiles[:, 9] = self._num_bits, len(group.sees), counts
        visits = np.nonzero(visited)[1] * tiling.keys + key_start

        bits = np.ravel(group.sees).view(np.uint8)
        self._is_dense &= is_dense
        self._orders.append(order)
        self._num_keys += order.num_keys
        self._num_visits += len(visits)
        self._num_bits += len(bits)
        return self._laid(group, start, order, key_start), visits, bits, row_tiles

    def _laid(self, group: Group, start: int, order: Order, key_start: int) -> IntTable:
        """[tiles, 6]: what is laid where."""
        cached, kinds, place = key_tiles(group, _TOKENS)
        self._kinds |= int(np.bitwise_or.reduce(1 << kinds, initial=0))
        to = order.segments[cached[:, 4]] + place + key_start
        lengths = order.lengths
        of, number = _within(-(-lengths // _TOKENS))
        rows, fresh = order.firsts[of] + number * _TOKENS, np.zeros((len(of), 6), np.int64)
        fresh[:, 0], fresh[:, 2] = rows + start, np.minimum(lengths[of] - number * _TOKENS, _TOKENS)
        fresh[:, 4], fresh[:, 5] = order.rows[rows] + key_start, _FRESH
        return np.concatenate([np.column_stack([cached[:, :4], to, kinds]), fresh])

    def _divide(self, row_tiles: IntTable, num_kv_heads: int, tiling: Tiling) -> None:
        """Tasks of about equal length, the longest first, and which of them are merged."""
        whole, visits = (row_tiles[:, 3] - row_tiles[:, 2]) // tiling.keys, row_tiles[:, 9]
        of, begin, end = divided(whole + visits, num_kv_heads, tiling)
        tasks = row_tiles[of]
        key_from, visit_from = tasks[:, 2].copy(), tasks[:, 4].copy()
        for column, to in ((2, begin), (3, end)):
            tasks[:, column] = key_from + np.minimum(to, whole[of]) * tiling.keys
        for column, to in ((4, begin), (5, end)):
            tasks[:, column] = visit_from + np.maximum(to - whole[of], 0)
        tasks[:, 9], self._merges = slots_of(of, row_tiles[:, 0], row_tiles[:, 1])
        self._num_slots = int((tasks[:, 9] >= 0).sum())
        self._tasks = tasks[np.argsort(begin - end, kind="stable")]


def _seen_whole(group: Group, order: Order) -> IntTable:
    """[rows]: one past the last key of those, from the first on, all of which a row sees."""
    unseen = ~group.sees & (order.counts > 0)
    np.fill_diagonal(unseen, val=False)
    end = order.num_keys
    first_unseen = np.where(unseen, order.blocks, end).min(axis=1, initial=end)
    return np.asarray(np.minimum(first_unseen[group.block], order.rows + 1))


def _visited(
    group: Group, order: Order, firsts: IntTable, whole: IntTable, last: IntTable, keys: int, is_dense: bool
) -> npt.NDArray[np.bool_]:
    """[row tiles, tiles of keys]: those beyond the whole ones that hold a key which some row of the tile may see."""
    tile = np.arange(-(-order.num_keys // keys))
    visited = (tile >= whole[:, None]) & (tile * keys < last[:, None])
    if is_dense:
        return visited
    seen = group.sees[group.block]
    seen[np.arange(group.num_rows), group.block] = True
    seen = np.logical_or.reduceat(seen, firsts, axis=0) & (order.counts > 0)
    ends = order.blocks + order.counts
    covers = (tile >= order.blocks[:, None] // keys) & (tile * keys < ends[:, None])
    return visited & (seen.astype(np.float32) @ covers.astype(np.float32) > 0)


class Laid(Way):
    """The launches of a layer, for passes of one shape."""

    def __init__(self, spec: ModelSpec, rope: Rope, shape: LaidShape) -> None:
        super().__init__(spec, rope, shape)
        self._shape = shape

    def __call__(self, layer: int, qkv: torch.Tensor, output: torch.Tensor, lse: torch.Tensor) -> None:
        spec, rope, shape = self._spec, self._rope, self._shape
        tiles, tasks, visits, rows, told, merges, bits = self._tables.views
        keys, values = qkv.new_empty(2, spec.num_kv_heads, shape.keys, spec.head_dim)  # graphs share this memory
        _KERNELS.lay_kernel[len(tiles), spec.num_kv_heads](
            *(qkv, keys, values, rope.cos, tiles, rope.cos, rope.sin, layer, shape.keys, qkv.stride(0)),
            **lay_constants(spec, shape.kinds),
        )
        _KERNELS.laid_kernel[len(tasks), spec.num_kv_heads](
            *(qkv, output, lse, *self._parts, keys, values, tasks, visits, rows, told, bits),
            *(shape.keys, self._scale, qkv.stride(0)),
            **laid_constants(spec, shape.tiling, qkv.dtype, told=bool(shape.told)),
            num_warps=shape.tiling.num_warps,
            num_stages=shape.tiling.num_stages,
        )
        self._merge(output, lse, merges)


def lay_constants(spec: ModelSpec, kinds: int) -> dict[str, object]:
    """What `lay_kernel` is compiled for."""
    return {"H": spec.num_heads, "TOKENS": _TOKENS, **reading_constants(spec, kinds)}


def laid_constants(spec: ModelSpec, tiling: Tiling, dtype: torch.dtype, *, told: bool) -> dict[str, object]:
    """What `laid_kernel` is compiled for."""
    return {**head_constants(spec), **row_constants(tiling, dtype), "TOLD": told}
