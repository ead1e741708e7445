"""What a pass looks like, as the kernels of `triton_kernels.py` are told: made on the host, sent in one copy.

Rows of a group are cut into tiles, and so is every segment. A row tile visits those tiles of cached keys that any of
its rows sees, ordered by their dtype, then a range of the fresh rows. Where that is much, it is divided among tasks.

Knows nothing of Triton. Invariant: every key that a row sees is in exactly one task of its row tile.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import numpy.typing as npt
import torch

from rcllm.model.attend.segments import Group, Keys
from rcllm.model.spec import ModelSpec

IntTable = npt.NDArray[np.int64]
KINDS = (torch.float32, torch.float16, torch.bfloat16, torch.int8)  # of cached KV, as the kernel numbers them
_PROGRAMS_PER_CORE = 2  # that a pass is divided into, at least, where it has the keys
_LEAST_TILES = 4  # of keys, in one task: below, merging costs more than it gains
_INTERPRETED_CORES = 4
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
        wide = dtype == torch.float32
        share = padded(spec.num_heads // spec.num_kv_heads)
        needed = padded(max(group.num_rows for group in groups)) * share
        queries = max(16, share, min(needed, 32 if wide else 128))
        return cls(queries, 32 if wide else 64, _PROGRAMS_PER_CORE * _num_cores(device), 8 if queries >= 128 else 4)


@cache
def _num_cores(device: torch.device) -> int:
    if device.type != "cuda":
        return _INTERPRETED_CORES
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


class Tables:
    """On the device, for all layers of one pass."""

    def __init__(self, spec: ModelSpec, groups: Sequence[Group], tiling: Tiling, anchor: torch.Tensor) -> None:
        """anchor: on the device; where cached KV lies is told in bytes from it."""
        self.tiling, device = tiling, anchor.device
        share = padded(spec.num_heads // spec.num_kv_heads)
        self.tile_rows = tiling.queries // share
        host = _HostTables(spec.num_kv_heads, groups, tiling, self.tile_rows)
        self.kinds, self.num_tasks, self.num_merges = host.kinds, len(host.tasks), len(host.merges)
        assert anchor.data_ptr() % _UNIT == 0
        host.tiles[:, 0] -= anchor.data_ptr()
        arrays = (
            host.tiles,
            *(table.astype(np.int32) for table in (host.tasks, host.visits, host.rows, host.merges)),
            host.bits,
        )
        self.tiles, self.tasks, self.visits, self.rows, self.merges, self.bits = _sent(arrays, device)
        shape = (max(1, host.num_slots), self.tile_rows, spec.num_heads)
        self.part_output = torch.empty(*shape, spec.head_dim, device=device)
        self.part_lse = torch.empty(shape, device=device)


class _HostTables:
    """The same in numpy."""

    def __init__(self, num_kv_heads: int, groups: Sequence[Group], tiling: Tiling, tile_rows: int) -> None:
        self.kinds = 0  # bits of those dtypes that there are
        self._num_tiles = self._num_visits = self._num_bits = self._num_rows = 0
        parts = [self._add(group, tiling, tile_rows) for group in groups]
        self.tiles, self.visits, self.rows = (np.concatenate([part[i] for part in parts]) for i in range(3))
        self.bits = np.concatenate([part[3] for part in parts])
        self._divide(np.concatenate([part[4] for part in parts]), num_kv_heads, tiling)

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


def _sent(arrays: Sequence[npt.NDArray[np.generic]], device: torch.device) -> Iterator[torch.Tensor]:
    """All arrays on the device, by one copy that nothing waits for."""
    sizes = [array.nbytes for array in arrays]
    starts = np.cumsum([0, *(-(-size // _UNIT) * _UNIT for size in sizes)]).tolist()
    host = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=device.type == "cuda")
    room = host.numpy()
    for array, start, size in zip(arrays, starts, sizes, strict=False):
        room[start : start + size] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    there = host.to(device, non_blocking=True)
    for array, start, size in zip(arrays, starts, sizes, strict=False):
        flat = there[start : start + size]
        yield flat.view(torch.from_numpy(np.zeros(0, array.dtype)).dtype)
