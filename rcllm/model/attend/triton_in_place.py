"""Few rows on a GPU: cached keys are read where they lie, once, and queries are turned to meet them.

Rows of a group are cut into tiles, and so is every segment. A row tile visits those tiles of cached keys that any of
its rows sees, ordered by their dtype, then a range of the fresh rows. Where that is much, it is divided among tasks.
Invariant: every key that a row sees is in exactly one task of its row tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from rcllm.late import Late
from rcllm.model.attend.segments import Group, Keys, Segment
from rcllm.model.attend.triton_tables import (
    KINDS,
    UNIT,
    IntTable,
    Shape,
    Tiling,
    divided,
    interpreting,
    padded,
    shape_of,
    share_of,
    slots_of,
)
from rcllm.model.attend.triton_way import Way, reading_constants, row_constants
from rcllm.model.rope import Rope
from rcllm.model.spec import ModelSpec

_KERNELS = Late("rcllm.model.attend.triton_kernels")  # triton is optional
_NUMBERS = {dtype: number for number, dtype in enumerate(KINDS)}
_PROGRAMS_PER_CORE = 2  # that a pass is divided into, at least, where it has the keys


def tiling_of(spec: ModelSpec, num_rows: int, dtype: torch.dtype, cores: int) -> Tiling:
    """For groups of at most `num_rows` rows in `dtype`: tiles as large as they fill, up to what fits the registers."""
    most, keys = (32, 32) if dtype == torch.float32 else (128, 64)
    if interpreting():
        most, keys = 256, 64
    queries = max(16, share_of(spec), min(padded(num_rows) * share_of(spec), most))
    programs = _PROGRAMS_PER_CORE * cores
    if queries <= 32 and dtype != torch.float32:  # the larger a tile, the fewer times queries are turned
        return Tiling(queries, 2 * keys, programs, num_stages=2)
    return Tiling(queries, keys, programs, 8 if queries >= 128 else 4)


@dataclass(frozen=True, slots=True)
class InPlaceShape:
    """What the kernel is compiled for, and how long each table is."""

    tiling: Tiling
    kinds: int  # bits of the dtypes of cached KV
    tiles: int
    tasks: int
    rows: int
    merges: int
    bits: int
    slots: int

    def rounded(self, rows: int) -> InPlaceShape:
        """For all passes of about this size, of at most `rows` rows. Longer tables cost little, more tasks some."""
        tasks, merges = max(32, padded(self.tasks)), padded(max(1, self.merges))
        tiles, bits = max(512, padded(self.tiles)), max(1 << 16, padded(self.bits))
        return InPlaceShape(self.tiling, self.kinds, tiles, tasks, rows, merges, bits, slots=tasks)

    @property
    def tables(self) -> tuple[Shape, ...]:
        """In the order in which they are sent."""
        ints = ((self.tasks, 16), (self.rows, 4), (self.merges, 4))
        return (
            shape_of(np.int64, self.tiles, 5),
            *(shape_of(np.int32, *shape) for shape in ints),
            shape_of(np.uint8, self.bits),
        )

    def on(self, spec: ModelSpec, rope: Rope) -> InPlace:
        return InPlace(spec, rope, self)


class InPlaceTables:
    """The tables of some groups of a pass in numpy."""

    def __init__(self, spec: ModelSpec, groups: Sequence[Group], starts: Sequence[int], tiling: Tiling) -> None:
        """starts: the first row of each group in the pass."""
        self._kinds = self._num_tiles = self._num_bits = 0
        end = starts[-1] + groups[-1].num_rows
        self._rows = np.zeros((end, 4), np.int64)
        parts = [
            self._add(group, start, tiling, tiling.rows(spec)) for group, start in zip(groups, starts, strict=True)
        ]
        self._tiles, self._bits, row_tiles = (np.concatenate([part[i] for part in parts]) for i in range(3))
        self._divide(row_tiles, spec.num_kv_heads, tiling)
        lengths = (len(self._tiles), len(self._tasks), end, len(self._merges), len(self._bits))
        self.shape = InPlaceShape(tiling, self._kinds, *lengths, slots=self._num_slots)

    def arrays(self, anchor: int) -> list[npt.NDArray[np.generic]]:
        return [self._tiles - np.array([anchor, 0, 0, 0, 0]), self._tasks, self._rows, self._merges, self._bits]

    def _add(
        self, group: Group, start: int, tiling: Tiling, tile_rows: int
    ) -> tuple[IntTable, npt.NDArray[np.uint8], IntTable]:
        """tiles [visits, 5], bits, and row tiles [row tiles, 16] as tasks before division.

        In place of a slot a row tile has its number of visits.
        """
        firsts = np.arange(0, group.num_rows, tile_rows)
        ends = np.minimum(firsts + tile_rows, group.num_rows)
        mask = group.segment_mask()
        tiles, kinds, _ = key_tiles(group, tiling.keys)
        self._kinds |= int(np.bitwise_or.reduce(1 << kinds, initial=0))
        visited = np.logical_or.reduceat(mask, firsts, axis=0)[:, tiles[:, 4]]  # [row tiles, tiles]
        counts = np.stack([(visited & (kinds < kind)).sum(axis=1) for kind in range(len(KINDS) + 1)], axis=1)
        visits = np.nonzero(visited)[1]
        before = np.cumsum(counts[:, -1]) - counts[:, -1] + self._num_tiles

        rows = _rows_table(group)
        dense = np.logical_and.reduceat(rows[:, 4] != 0, firsts)
        first, last = np.minimum.reduceat(rows[:, 2], firsts), np.maximum.reduceat(rows[:, 3], firsts)
        rows[:, 2:4] += start
        self._rows[start : start + group.num_rows] = rows[:, :4]

        row_tiles = np.zeros((len(firsts), 16), np.int64)
        row_tiles[:, 0], row_tiles[:, 1] = firsts + start, ends - firsts
        row_tiles[:, 2:7] = before[:, None] + counts
        row_tiles[:, 7], row_tiles[:, 8], row_tiles[:, 9] = first + start, last + start, dense
        row_tiles[:, 10:13] = start, self._num_bits, mask.shape[1]
        row_tiles[:, 13:15] = self._num_bits + mask.size, len(group.sees)
        row_tiles[:, 15] = counts[:, -1]

        bits = np.concatenate([np.ravel(mask), np.ravel(group.sees)]).view(np.uint8)
        self._num_tiles += len(visits)
        self._num_bits += len(bits)
        return tiles[visits], bits, row_tiles

    def _divide(self, row_tiles: IntTable, num_kv_heads: int, tiling: Tiling) -> None:
        """Tasks of about equal length, and which of them are merged."""
        num_visits, fresh = row_tiles[:, 15], -(-(row_tiles[:, 8] - row_tiles[:, 7]) // tiling.keys)
        of, begin, end = divided(num_visits + fresh, num_kv_heads, tiling)
        tasks = row_tiles[of]
        visit_from = tasks[:, 2].copy()
        limits = (visit_from + np.minimum(begin, num_visits[of]), visit_from + np.minimum(end, num_visits[of]))
        tasks[:, 2:7] = np.clip(tasks[:, 2:7], limits[0][:, None], limits[1][:, None])
        fresh_from = tasks[:, 7].copy()
        tasks[:, 7] = fresh_from + np.maximum(begin - num_visits[of], 0) * tiling.keys
        tasks[:, 8] = np.minimum(fresh_from + np.maximum(end - num_visits[of], 0) * tiling.keys, tasks[:, 8])
        tasks[:, 15], self._merges = slots_of(of, row_tiles[:, 0], row_tiles[:, 1])
        self._tasks, self._num_slots = tasks, int((tasks[:, 15] >= 0).sum())


class InPlace(Way):
    """The launches of a layer, for passes of one shape."""

    def __init__(self, spec: ModelSpec, rope: Rope, shape: InPlaceShape) -> None:
        super().__init__(spec, rope, shape)
        self._shape = shape

    def __call__(self, layer: int, qkv: torch.Tensor, output: torch.Tensor, lse: torch.Tensor) -> None:
        spec, rope, tiling = self._spec, self._rope, self._shape.tiling
        tiles, tasks, rows, merges, bits = self._tables.views
        _KERNELS.attend_kernel[len(tasks), spec.num_kv_heads](
            *(qkv, output, lse, *self._parts, rope.cos, tiles, tasks, rows, bits),
            *(rope.cos, rope.sin, layer, self._scale, qkv.stride(0)),
            **constants(spec, tiling, self._shape.kinds, qkv.dtype),
            num_warps=tiling.num_warps,
            num_stages=tiling.num_stages,
        )
        self._merge(output, lse, merges)


def constants(spec: ModelSpec, tiling: Tiling, kinds: int, dtype: torch.dtype) -> dict[str, object]:
    """What `attend_kernel` is compiled for."""
    heads = {"H": spec.num_heads, "SHARE_PADDED": share_of(spec)}
    return {**heads, **reading_constants(spec, kinds), **row_constants(tiling, dtype)}


def key_tiles(group: Group, keys: int) -> tuple[IntTable, IntTable, IntTable]:
    """The tiles of a group's segments by dtype; the dtype of each, and its place within its segment.

    [tiles, 5]: address of the first key in layer 0 and head 0, tokens of the block, keys, base, segment.
    """
    segments = group.segments
    if not segments:
        return np.zeros((0, 5), np.int64), np.zeros(0, np.int64), np.zeros(0, np.int64)
    assert all(segment.kv.is_contiguous() for segment in segments), "KV blocks are contiguous"
    table = np.array([_told(segment) for segment in segments], np.int64)
    assert not (table[:, 0] % UNIT).any(), "KV blocks begin at multiples of 16 bytes"
    order = np.argsort(table[:, 6], kind="stable")
    counts = -(-table[order, 4] // keys)
    of = np.repeat(order, counts)
    place = (np.arange(len(of)) - np.repeat(np.cumsum(counts) - counts, counts)) * keys
    address, block_len, row_bytes, start, length, base, kind = table[of].T
    tiles = np.column_stack(
        [address + (start + place) * row_bytes, block_len, np.minimum(length - place, keys), base, of]
    )
    return tiles, kind, place


def _told(segment: Segment) -> tuple[int, ...]:
    """Address and tokens of its block, bytes of a row, its own first token, its tokens, base, dtype."""
    kv = segment.kv
    *_, length, width = kv.shape
    row_bytes, own = width * kv.itemsize, segment.stop - segment.start
    return kv.data_ptr(), length, row_bytes, segment.start, own, segment.base, _NUMBERS[kv.dtype]


def _rows_table(group: Group) -> IntTable:
    """[rows, 5]: block, offset, the first row that it sees, one past the last, and whether it sees all between."""
    num_rows = group.num_rows
    keys = Keys.of(replace(group, segments=()))
    if (keys.rows == np.arange(num_rows)).all():
        reach = group.reach(keys)
    else:  # blocks stand in another order than the prompt's
        reach = np.tile(np.array([0, num_rows, 0], np.int32), (num_rows, 1))
    return np.column_stack([group.block, group.offset, reach]).astype(np.int64)
