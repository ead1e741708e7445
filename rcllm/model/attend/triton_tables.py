"""What the ways of attending on a GPU have in common: how a pass is cut, and tables that are sent in one copy.

Knows nothing of Triton, nor of what the tables say. Invariant: sending a table waits for nothing.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import torch

from rcllm.model.spec import ModelSpec

IntTable = npt.NDArray[np.int64]
Shape = tuple[np.dtype[np.generic], tuple[int, ...]]  # of a table
KINDS = (torch.float32, torch.float16, torch.bfloat16, torch.int8)  # of cached KV, as the kernels number them
UNIT = 16  # bytes at which every table, and every KV block, begins
_INTERPRETED_PROGRAMS = 4
_LEAST_TILES = 4  # of keys, in one task: below, merging costs more than it gains


def padded(count: int) -> int:
    """The next power of two."""
    return 1 << max(0, count - 1).bit_length()


def share_of(spec: ModelSpec) -> int:
    """Query heads of a KV head, padded: they share a tile."""
    return padded(spec.num_heads // spec.num_kv_heads)


def interpreting() -> bool:
    """Whether Triton's kernels run in its interpreter, on the CPU and slowly: for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def num_cores(device: torch.device) -> int:
    """Of a GPU; of the interpreter, which takes its time for each program, few."""
    if device.type != "cuda":
        return _INTERPRETED_PROGRAMS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a pass is cut into programs."""

    queries: int  # of a tile: rows times query heads of a KV head, padded to a power of two; at least 16
    keys: int  # of a tile, at least 16
    num_programs: int  # to divide keys for, all KV heads together
    num_warps: int = 4
    num_stages: int = 3

    def rows(self, spec: ModelSpec) -> int:
        """Of a tile."""
        return self.queries // share_of(spec)


class DeviceTables:
    """Tables of given shapes on the device, which may be sent anew for as many passes as fit them."""

    def __init__(self, shapes: Sequence[Shape], device: torch.device) -> None:
        self._shapes = shapes
        sizes = [dtype.itemsize * math.prod(shape) for dtype, shape in shapes]
        self._starts = list(accumulate((-(-size // UNIT) * UNIT for size in sizes), initial=0))
        self._there = torch.empty(self._starts[-1], dtype=torch.uint8, device=device)
        self.views = list(self._views())

    def _views(self) -> Iterator[torch.Tensor]:
        for start, (dtype, shape) in zip(self._starts, self._shapes, strict=False):
            flat = self._there[start : start + dtype.itemsize * math.prod(shape)]
            yield flat.view(torch.from_numpy(np.zeros(0, dtype)).dtype).view(shape)

    def send(self, tables: Sequence[npt.NDArray[np.generic]]) -> None:
        """By one copy. What a table has beyond what is sent is zeros."""
        packed = torch.zeros(len(self._there), dtype=torch.uint8, pin_memory=self._there.device.type == "cuda")
        room = packed.numpy()
        for table, start, (dtype, _) in zip(tables, self._starts, self._shapes, strict=False):
            flat = np.ascontiguousarray(table, dtype).reshape(-1).view(np.uint8)
            room[start : start + len(flat)] = flat
        self._there.copy_(packed, non_blocking=True)


def shape_of(dtype: type[np.generic], *lengths: int) -> Shape:
    return np.dtype(dtype), lengths


def divided(units: IntTable, num_kv_heads: int, tiling: Tiling) -> tuple[IntTable, IntTable, IntTable]:
    """Row tiles that visit so many tiles of keys, their `units`, as tasks of about equal length.

    Per task its row tile, its first unit and its last; a row tile without work has one task.
    """
    each = max(_LEAST_TILES, -(-int(units.sum()) * num_kv_heads // tiling.num_programs))
    counts = np.maximum(1, (units + each // 2) // each)  # the nearest, so that there are not many more than programs
    of = np.repeat(np.arange(len(units)), counts)
    number = np.arange(len(of)) - (np.cumsum(counts) - counts)[of]
    return of, number * units[of] // counts[of], (number + 1) * units[of] // counts[of]


def slots_of(of: IntTable, first_row: IntTable, num_rows: IntTable) -> tuple[IntTable, IntTable]:
    """Where tasks that share a row tile put their parts, by task; −1 for the others. And what is merged, [merges, 4].

    of: per task its row tile; first_row, num_rows: of row tiles. A merge: first row, rows, first slot, slots.
    """
    counts = np.bincount(of, minlength=len(first_row))
    split = counts > 1
    slots = np.where(split[of], np.cumsum(split[of]) - 1, -1)
    firsts = (np.cumsum(counts) - counts)[split]
    return slots, np.column_stack([first_row[split], num_rows[split], slots[firsts], counts[split]])
