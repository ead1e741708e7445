"""What a pass looks like, as the kernels of `triton_kernels.py` are told: made on the host, sent in one copy.

Rows of a group are cut into tiles, and so is every segment. A row tile visits those tiles of cached keys that any of
its rows sees, ordered by their dtype, then a range of the fresh rows. Where that is much, it is divided among tasks.

Knows nothing of Triton. Invariant: every key that a row sees is in exactly one task of its row tile.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import torch

from rcllm.model.attend.segments import Group, Keys
from rcllm.model.spec import ModelSpec

IntTable = npt.NDArray[np.int64]
KINDS = (torch.float32, torch.float16, torch.bfloat16, torch.int8)  # of cached KV, as the kernel numbers them
_PROGRAMS_PER_CORE = 2  # that a pass is divided into, at least, where it has the keys
_LEAST_TILES = 4  # of keys, in one task: below, merging costs more than it gains
_INTERPRETED_PROGRAMS = 4
_UNIT = 16  # bytes at which every table begins


def padded(count: int) -> int:
    """The next power of two."""
    return 1 << max(0, count - 1).bit_length()


def interpreting() -> bool:
    """Whether Triton's kernels run in its interpreter, on the CPU and slowly: for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a pass is cut into programs."""

    queries: int  # of a tile: rows times query heads of a KV head, padded to a power of two; at least 16
    keys: int  # of a tile, at least 16
    num_programs: int  # to divide keys for, all KV heads together
    num_warps: int = 4
    num_stages: int = 3

    @classmethod
    def of(cls, spec: ModelSpec, groups: Sequence[Group], device: torch.device, dtype: torch.dtype) -> Tiling:
        """By the largest group: tiles as large as it fills, up to what fits the registers."""
        num_rows = max(group.num_rows for group in groups)
        if device.type == "cuda":
            return cls.on_gpu(spec, num_rows, dtype, _num_cores(device))
        # the interpreter takes its time for each program, however much that computes
        return cls(_queries(spec, num_rows, 256), 64, _INTERPRETED_PROGRAMS)

    @classmethod
    def on_gpu(cls, spec: ModelSpec, num_rows: int, dtype: torch.dtype, num_cores: int) -> Tiling:
        """For groups of at most `num_rows` rows in `dtype`."""
        most, keys = (32, 32) if dtype == torch.float32 else (128, 64)
        queries = _queries(spec, num_rows, most)
        return cls(queries, keys, _PROGRAMS_PER_CORE * num_cores, 8 if queries >= 128 else 4)


def _queries(spec: ModelSpec, num_rows: int, most: int) -> int:
    share = padded(spec.num_heads // spec.num_kv_heads)
    return max(16, share, min(padded(num_rows) * share, most))


@cache
def _num_cores(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@dataclass(frozen=True, slots=True)
class Layout:
    """How long each table is, and how many parts are merged."""

    tiles: int
    tasks: int
    visits: int
    rows: int
    merges: int
    bits: int
    slots: int

    def rounded(self, rows: int) -> Layout:
        """For all passes of about this size, of at most `rows` rows. Longer tables cost little, more tasks some."""
        tasks, merges = max(32, padded(self.tasks)), padded(max(1, self.merges))
        tiles, visits, bits = (
            max(512, padded(self.tiles)),
            max(2048, padded(self.visits)),
            max(1 << 16, padded(self.bits)),
        )
        return Layout(tiles, tasks, visits, rows, merges, bits, slots=tasks)

    @property
    def shapes(self) -> tuple[tuple[np.dtype[np.generic], tuple[int, ...]], ...]:
        """Of the tables in the order in which they are sent."""
        ints = ((self.tasks, 16), (self.visits,), (self.rows, 4), (self.merges, 4))
        return (
            (np.dtype(np.int64), (self.tiles, 5)),
            *((np.dtype(np.int32), shape) for shape in ints),
            (np.dtype(np.uint8), (self.bits,)),
        )


class Tables:
    """On the device, for all layers of one pass; may be sent anew for another pass of the same layout and tiling."""

    def __init__(self, spec: ModelSpec, layout: Layout, tiling: Tiling, device: torch.device) -> None:
        self.layout, self.tiling = layout, tiling
        self.tile_rows = tiling.queries // padded(spec.num_heads // spec.num_kv_heads)
        self._starts = _starts(layout)
        self._there = torch.empty(self._starts[-1], dtype=torch.uint8, device=device)
        self.tiles, self.tasks, self.visits, self.rows, self.merges, self.bits = self._views()
        shape = (max(1, layout.slots), self.tile_rows, spec.num_heads)
        self.part_output = torch.empty(*shape, spec.head_dim, device=device)
        self.part_lse = torch.empty(shape, device=device)

    def _views(self) -> Iterator[torch.Tensor]:
        for start, (dtype, shape) in zip(self._starts, self.layout.shapes, strict=False):
            flat = self._there[start : start + dtype.itemsize * math.prod(shape)]
            yield flat.view(torch.from_numpy(np.zeros(0, dtype)).dtype).view(shape)

    def send(self, host: HostTables, anchor: torch.Tensor) -> None:
        """By one copy that nothing waits for. anchor: what the distances of cached KV are counted from.

        What a table has beyond those of `host` is zeros: tasks and merges of no rows.
        """
        assert anchor.data_ptr() % _UNIT == 0
        on_gpu = self._there.device.type == "cuda"
        packed = torch.zeros(len(self._there), dtype=torch.uint8, pin_memory=on_gpu)
        room = packed.numpy()
        tiles = host.tiles - np.array([anchor.data_ptr(), 0, 0, 0, 0])
        tables = (tiles, host.tasks, host.visits, host.rows, host.merges, host.bits)
        for table, start, (dtype, _) in zip(tables, self._starts, self.layout.shapes, strict=False):
            flat = np.ascontiguousarray(table, dtype).reshape(-1).view(np.uint8)
            room[start : start + len(flat)] = flat
        self._there.copy_(packed, non_blocking=True)


def _starts(layout: Layout) -> list[int]:
    """Where each table begins, in bytes, and where all end."""
    sizes = [dtype.itemsize * math.prod(shape) for dtype, shape in layout.shapes]
    return list(accumulate((-(-size // _UNIT) * _UNIT for size in sizes), initial=0))


class HostTables:
    """The tables of a pass in numpy."""

    def __init__(self, spec: ModelSpec, groups: Sequence[Group], tiling: Tiling) -> None:
        tile_rows = tiling.queries // padded(spec.num_heads // spec.num_kv_heads)
        self.kinds = 0  # bits of those dtypes that there are
        self._num_tiles = self._num_visits = self._num_bits = self._num_rows = 0
        parts = [self._add(group, tiling, tile_rows) for group in groups]
        self.tiles, self.visits, self.rows = (np.concatenate([part[i] for part in parts]) for i in range(3))
        self.bits = np.concatenate([part[3] for part in parts])
        self._divide(np.concatenate([part[4] for part in parts]), spec.num_kv_heads, tiling)

    @property
    def layout(self) -> Layout:
        return Layout(
            tiles=len(self.tiles),
            tasks=len(self.tasks),
            visits=len(self.visits),
            rows=len(self.rows),
            merges=len(self.merges),
            bits=len(self.bits),
            slots=self.num_slots,
        )

    def _add(
        self, group: Group, tiling: Tiling, tile_rows: int
    ) -> tuple[IntTable, IntTable, IntTable, npt.NDArray[np.uint8], IntTable]:
        """tiles [tiles, 5], visits, rows [rows, 4], bits, and row tiles [row tiles, 16] as tasks before division.

        In place of a slot a row tile has its number of visits.
        """
        starts = np.arange(0, group.num_rows, tile_rows)
        ends = np.minimum(starts + tile_rows, group.num_rows)
        mask = group.segment_mask()
        tiles, kinds = _key_tiles(group, tiling.keys)
        self.kinds |= int(np.bitwise_or.reduce(1 << kinds, initial=0))
        visited = np.logical_or.reduceat(mask, starts, axis=0)[:, tiles[:, 4]]  # [row tiles, tiles]
        counts = np.stack([(visited & (kinds < kind)).sum(axis=1) for kind in range(len(KINDS) + 1)], axis=1)
        visits = np.nonzero(visited)[1] + self._num_tiles
        before = np.cumsum(counts[:, -1]) - counts[:, -1] + self._num_visits

        rows = _rows_table(group)
        dense = np.logical_and.reduceat(rows[:, 4] != 0, starts)
        first, last = np.minimum.reduceat(rows[:, 2], starts), np.maximum.reduceat(rows[:, 3], starts)
        rows[:, 2:4] += self._num_rows

        row_tiles = np.zeros((len(starts), 16), np.int64)
        row_tiles[:, 0], row_tiles[:, 1] = starts + self._num_rows, ends - starts
        row_tiles[:, 2:7] = before[:, None] + counts
        row_tiles[:, 7], row_tiles[:, 8], row_tiles[:, 9] = first + self._num_rows, last + self._num_rows, dense
        row_tiles[:, 10:13] = self._num_rows, self._num_bits, mask.shape[1]
        row_tiles[:, 13:15] = self._num_bits + mask.size, len(group.sees)
        row_tiles[:, 15] = counts[:, -1]

        bits = np.concatenate([np.ravel(mask), np.ravel(group.sees)]).view(np.uint8)
        self._num_tiles += len(tiles)
        self._num_visits += len(visits)
        self._num_bits += len(bits)
        self._num_rows += group.num_rows
        return tiles, visits, rows[:, :4], bits, row_tiles

    def _divide(self, row_tiles: IntTable, num_kv_heads: int, tiling: Tiling) -> None:
        """Tasks of about equal length, and which of them are merged."""
        num_visits, fresh = row_tiles[:, 15], -(-(row_tiles[:, 8] - row_tiles[:, 7]) // tiling.keys)
        units = num_visits + fresh
        each = max(_LEAST_TILES, -(-int(units.sum()) * num_kv_heads // tiling.num_programs))
        counts = -(-units // each)
        of = np.repeat(np.arange(len(row_tiles)), counts)
        firsts = np.cumsum(counts) - counts
        begin = (np.arange(len(of)) - firsts[of]) * each
        end = np.minimum(begin + each, units[of])
        tasks = row_tiles[of]
        visit_from = tasks[:, 2].copy()
        limits = (visit_from + np.minimum(begin, num_visits[of]), visit_from + np.minimum(end, num_visits[of]))
        tasks[:, 2:7] = np.clip(tasks[:, 2:7], limits[0][:, None], limits[1][:, None])
        fresh_from = tasks[:, 7].copy()
        tasks[:, 7] = fresh_from + np.maximum(begin - num_visits[of], 0) * tiling.keys
        tasks[:, 8] = np.minimum(fresh_from + np.maximum(end - num_visits[of], 0) * tiling.keys, tasks[:, 8])
        split = counts > 1
        slots = np.cumsum(np.where(split[of], 1, 0)) - 1
        tasks[:, 15] = np.where(split[of], slots, -1)
        self.tasks, self.num_slots = tasks, int(split[of].sum())
        self.merges = np.column_stack([row_tiles[split, 0], row_tiles[split, 1], slots[firsts[split]], counts[split]])


def _key_tiles(group: Group, keys: int) -> tuple[IntTable, IntTable]:
    """The tiles of a group's segments by dtype, and the dtype of each.

    [tiles, 5]: address of the first key in layer 0 and head 0, tokens of the block, keys, base, segment.
    """
    segments = group.segments
    if not segments:
        return np.zeros((0, 5), np.int64), np.zeros(0, np.int64)
    assert all(segment.kv.is_contiguous() for segment in segments), "KV blocks are contiguous"
    table = np.array(
        [
            (
                s.kv.data_ptr(),
                s.kv.shape[3],
                s.kv.shape[4] * s.kv.itemsize,
                s.start,
                len(s),
                s.base,
                KINDS.index(s.kv.dtype),
            )
            for s in segments
        ],
        dtype=np.int64,
    )
    assert not (table[:, 0] % _UNIT).any(), "KV blocks begin at multiples of 16 bytes"
    order = np.argsort(table[:, 6], kind="stable")
    counts = -(-table[order, 4] // keys)
    of = np.repeat(order, counts)
    place = (np.arange(len(of)) - np.repeat(np.cumsum(counts) - counts, counts)) * keys
    address, block_len, row_bytes, start, length, base, kind = table[of].T
    tiles = np.column_stack(
        [address + (start + place) * row_bytes, block_len, np.minimum(length - place, keys), base, of]
    )
    return tiles, kind


def _rows_table(group: Group) -> IntTable:
    """[rows, 5]: block, offset, the first row that it sees, one past the last, and whether it sees all between."""
    num_rows = group.num_rows
    keys = Keys.of(replace(group, segments=()))
    if (keys.rows == np.arange(num_rows)).all():
        reach = group.reach(keys)
    else:  # blocks stand in another order than the prompt's
        reach = np.tile(np.array([0, num_rows, 0], np.int32), (num_rows, 1))
    return np.column_stack([group.block, group.offset, reach]).astype(np.int64)
