"""Attention over segments on the compiled CPU kernels (`kernels.cpp`): in place, or over a gathered buffer per layer.

Knows nothing of when which is quicker (`choose.py`). Invariant: a row's bits depend on its own keys alone, whatever
else is in the pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch

from rcllm.core.ranking import BoolArray
from rcllm.model.attend.contract import Attended
from rcllm.model.attend.native import Kernels
from rcllm.model.attend.segments import Group, Keys
from rcllm.model.rope import Rope
from rcllm.model.spec import ModelSpec

_ITEMS = 8  # for each thread; with more of them, unequal ones are shared out well enough
_MIN_TOKENS = 12  # a tile with fewer spends its time on reading keys
_DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.int8: 3}


class NativeSegmented:
    """On the CPU over fp32, fp16, bf16 or int8 segments, read in place: nothing is copied. Softmax and sums in fp32.

    `bf16`: whether both products round their operands (scaled queries, keys in their place, weights, values) to bf16.
    Needs head_dim to be a multiple of 32 (whole vectors in each half of a head).
    """

    name = "segmented"
    bytes_copied = 0

    def __init__(
        self, spec: ModelSpec, rope: Rope, groups: Sequence[Group], kernels: Kernels, bf16: bool = False
    ) -> None:
        self._bf16 = bf16
        self._init(spec, rope, kernels, groups, [Keys.of(replace(group, segments=())) for group in groups])
        self._segments = self._segment_table(groups)

    def _init(
        self, spec: ModelSpec, rope: Rope, kernels: Kernels, groups: Sequence[Group], keys: Sequence[Keys]
    ) -> None:
        """`groups` with the segments that are read in place; `keys`: what lies in one buffer."""
        self._spec, self._rope, self._kernels = spec, rope, kernels
        self._groups = torch.from_numpy(_group_table(groups, keys))
        self._sees_segment = _flat_bytes([group.segment_mask() for group in groups])
        self._sees = _flat_bytes([group.sees for group in groups])
        rows = [np.column_stack([g.block, g.offset, g.reach(k)]) for g, k in zip(groups, keys, strict=True)]
        self._rows = torch.from_numpy(np.concatenate(rows).astype(np.int32))
        share = spec.num_heads // spec.num_kv_heads
        self._items = _items(groups, rows, kernels.row_tile // share, spec.num_kv_heads, torch.get_num_threads())
        places = [np.column_stack([k.block, k.offset]) for k in keys]
        self._keys = torch.from_numpy(np.concatenate(places).astype(np.int32))

    def _segment_table(self, groups: Sequence[Group]) -> torch.Tensor:
        segments = [segment for group in groups for segment in group.segments]
        assert all(s.kv.is_contiguous() for s in segments), "KV blocks are contiguous"
        self._kv = [segment.kv for segment in segments]  # keeps the memory behind the pointers alive
        table = [(s.kv.data_ptr(), s.kv.shape[3], s.start, len(s), s.base, _DTYPE_CODES[s.kv.dtype]) for s in segments]
        return torch.tensor(table, dtype=torch.int64).reshape(-1, 6)

    def __call__(self, layer: int, qkv: torch.Tensor) -> Attended:
        return self._attend(layer, qkv, qkv[:, self._spec.q_size :])

    def _attend(self, layer: int, qkv: torch.Tensor, kv: torch.Tensor) -> Attended:
        """kv [keys, 2·KV·D]"""
        spec = self._spec
        output = qkv.new_empty(qkv.shape[0], spec.q_size)
        lse = qkv.new_empty(qkv.shape[0], spec.num_heads)
        inputs = (qkv, qkv.stride(0), kv, kv[:, spec.kv_size :], kv.stride(0))
        self._kernels.call("attend", self.reads, layer, *inputs, output, lse, torch.get_num_threads())
        return Attended(output, lse)

    @cached_property
    def reads(self) -> torch.Tensor:
        """What all layers attend to, as the kernels read it; it points into the tables here."""
        masks = (self._sees_segment, self._sees)
        tables = (self._groups, self._segments, *masks, self._rows, self._keys, self._rope.cos, self._rope.sin)
        shape = (self._spec.num_heads, self._spec.num_kv_heads, self._spec.head_dim)
        pointers = [table.data_ptr() for table in tables]
        return torch.tensor([self._items.data_ptr(), len(self._items), *pointers, *shape, self._bf16])


class NativeGather(NativeSegmented):
    """The same, over one buffer per layer that holds the keys of segments and fresh rows in the order of the prompt.

    For segments of few tokens: every softmax step reads and writes the whole output, however few keys it adds.
    """

    name = "gather"

    def __init__(
        self, spec: ModelSpec, rope: Rope, groups: Sequence[Group], kernels: Kernels, bf16: bool = False
    ) -> None:
        self._bf16 = bf16
        keys = [Keys.of(group) for group in groups]
        self._init(spec, rope, kernels, [replace(group, segments=()) for group in groups], keys)
        self._segments = self._segment_table(groups)
        starts = np.cumsum([0, *(len(k.block) for k in keys)]).tolist()
        self._where = torch.from_numpy(np.concatenate([k.segments + at for k, at in zip(keys, starts, strict=False)]))
        self._fresh = torch.from_numpy(np.concatenate([k.rows + at for k, at in zip(keys, starts, strict=False)]))
        self._buffer = torch.empty(starts[-1], 2 * spec.kv_size)
        self._layer_bytes = sum(s.num_bytes for group in groups for s in group.segments) // spec.num_layers
        self.bytes_copied = 0

    def __call__(self, layer: int, qkv: torch.Tensor) -> Attended:
        spec, rope, buffer = self._spec, self._rope, self._buffer
        shape = (spec.num_kv_heads, spec.head_dim, layer)
        target = (rope.cos, rope.sin, buffer, buffer.stride(0), torch.get_num_threads())
        self._kernels.call("gather", self._segments, len(self._segments), self._where, *shape, *target)
        buffer.index_copy_(0, self._fresh, qkv[:, spec.q_size :])
        self.bytes_copied += self._layer_bytes
        return self._attend(layer, qkv, buffer)


def _group_table(groups: Sequence[Group], keys: Sequence[Keys]) -> npt.NDArray[np.int64]:
    """[groups, 9]: first and number of rows, keys and segments, where the two masks start in the flat bytes, blocks."""
    counts = [(g.num_rows, len(k.block), len(g.segments)) for g, k in zip(groups, keys, strict=True)]
    masks = [(g.num_rows * len(g.segments), g.sees.size) for g in groups]
    sizes = np.column_stack([np.array(counts, dtype=np.int64), np.array(masks, dtype=np.int64)])
    starts = np.cumsum(sizes, axis=0) - sizes
    pairs = np.stack([starts[:, :3], sizes[:, :3]], axis=2).reshape(len(groups), 6)
    blocks = np.array([len(group.sees) for group in groups], dtype=np.int64)
    return np.ascontiguousarray(np.column_stack([pairs, starts[:, 3:], blocks]))


def _items(
    groups: Sequence[Group],
    rows: Sequence[npt.NDArray[np.int64]],
    most: int,
    kv_heads: int,
    num_threads: int,
) -> torch.Tensor:
    """[items, 3]: group, first row, number of rows, at most `most`; those that take longest first.

    Where there are few, they are made smaller until every thread has its equal share, and of equal work. `rows`: the
    table of each group's rows.
    """
    found: list[tuple[int, int, int]] = []
    works: list[float] = []
    for number, (group, table) in enumerate(zip(groups, rows, strict=True)):
        num_rows = group.num_rows
        tiles = -(-num_rows // most)

        def few(tiles: int) -> bool:
            return len(groups) * tiles * kv_heads < _ITEMS * num_threads

        while few(tiles) and tiles * kv_heads % num_threads and num_rows // (tiles + 1) >= _MIN_TOKENS:
            tiles += 1
        seen = np.cumsum(_keys_seen(group, table))
        if tiles > 1 and few(tiles):
            cuts = np.searchsorted(seen, seen[-1] * np.arange(1, tiles) / tiles)
        else:
            cuts = num_rows * np.arange(1, tiles) // tiles
        for first, last in pairwise(_within(cuts, num_rows, most)):
            found.append((number, first, last - first))
            works.append(seen[last - 1] - (seen[first - 1] if first else 0))
    order = np.argsort(-np.array(works), kind="stable")
    return torch.from_numpy(np.array(found, dtype=np.int64)[order])


def _keys_seen(group: Group, table: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """[rows], about how many keys each row is shown."""
    lengths = np.array([len(segment) for segment in group.segments], dtype=np.int64)
    fresh: npt.NDArray[np.int64] = table[:, 3] - table[:, 2]
    return fresh + group.segment_mask() @ lengths


def _within(cuts: npt.NDArray[np.int64], num_rows: int, most: int) -> list[int]:
    """0, the cuts and the end, with a cut more wherever a tile would have more than `most` rows."""
    ends = [0]
    for end in (*cuts.tolist(), num_rows):
        while end - ends[-1] > most:
            ends.append(ends[-1] + most)
        if end > ends[-1]:
            ends.append(end)
    return ends


def _flat_bytes(masks: Sequence[BoolArray]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([np.ravel(mask) for mask in masks])).view(torch.uint8)
