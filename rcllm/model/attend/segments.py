"""What attention reads: cached segments and fresh rows, who sees whom, and the order of all keys.

A segment is cached KV at a place in this prompt: its keys are stored turned to their place within the block, and are
turned on by the segment's base when they are read. Computes no attention. Invariant: a token is a row or in one
segment, never both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from rcllm.core.ranking import BoolArray, IntArray
from rcllm.model.kv_int8 import widen
from rcllm.model.rope import Rope
from rcllm.model.upload import upload


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens `start` to `stop` of one KV block, as one request sees them."""

    kv: torch.Tensor  # [layers, 2, kv_heads, block_len, columns]; contiguous; K turned to block-local positions
    base: int  # position of the block's token 0 in this prompt
    start: int
    stop: int
    block: int  # which block of the group it belongs to

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def num_bytes(self) -> int:
        return self.kv.nbytes // self.kv.shape[3] * len(self)


@dataclass(frozen=True, slots=True)
class Group:
    """Consecutive fresh rows that share segments; rows of different groups never see each other.

    Who sees whom is told by blocks: a row sees what precedes it in its own block, and all of the blocks that its block
    sees, fresh or cached.
    """

    segments: tuple[Segment, ...]
    block: IntArray  # [rows], block of each row; rows of one block are consecutive
    offset: IntArray  # [rows], place of each row within its block
    sees: BoolArray  # [blocks, blocks], strictly lower triangular

    @classmethod
    def causal(cls, num_rows: int) -> Group:
        """One plain sequence."""
        return cls((), np.zeros(num_rows, np.int32), np.arange(num_rows, dtype=np.int32), np.zeros((1, 1), bool))

    @property
    def num_rows(self) -> int:
        return len(self.block)

    def segment_mask(self) -> BoolArray:
        """[rows, segments]"""
        blocks = np.array([segment.block for segment in self.segments], dtype=np.int32)
        starts = np.array([segment.start for segment in self.segments], dtype=np.int32)
        own = (self.block[:, None] == blocks) & (starts < self.offset[:, None])
        return np.asarray(own | self.sees[self.block[:, None], blocks], dtype=np.bool_)

    def row_mask(self) -> BoolArray:
        """[rows, rows]"""
        own = (self.block[:, None] == self.block) & (self.offset <= self.offset[:, None])
        return np.asarray(own | self.sees[self.block[:, None], self.block], dtype=np.bool_)

    def reach(self, keys: Keys) -> IntArray:
        """[rows, 3]: the first of `keys` that a row sees, one past the last (its own), whether it sees all between."""
        count = np.bincount(keys.block, minlength=len(self.sees))
        start = np.cumsum(count) - count
        seen = self.sees & (count > 0)
        first = np.minimum(np.where(seen, start, len(keys.block)).min(axis=1), start)[self.block]
        num_seen = (seen @ count)[self.block] + keys.rows - start[self.block] + 1
        return np.stack([first, keys.rows + 1, num_seen == keys.rows + 1 - first], axis=1).astype(np.int32)


@dataclass(frozen=True, slots=True)
class Keys:
    """All keys of a group, of its rows and its segments, in the order of blocks and of places within them."""

    block: IntArray  # [keys]
    offset: IntArray  # [keys]
    segments: npt.NDArray[np.int64]  # [segments], where the first key of each is; the others follow
    rows: npt.NDArray[np.int64]  # [rows], where each row's own key is

    @classmethod
    def of(cls, group: Group) -> Keys:
        lengths = np.array([len(s) for s in group.segments], dtype=np.int64)
        blocks = np.repeat(np.array([s.block for s in group.segments], dtype=np.int32), lengths)
        offsets = [np.arange(s.start, s.stop, dtype=np.int32) for s in group.segments]
        block, offset = np.concatenate([blocks, group.block]), np.concatenate([*offsets, group.offset])
        order = np.lexsort((offset, block))
        place = np.empty(len(order), dtype=np.int64)
        place[order] = np.arange(len(order))
        return cls(block[order], offset[order], place[np.cumsum(lengths) - lengths], place[len(blocks) :])


@torch.inference_mode()
def copy_segments(segments: Sequence[Segment], rope: Rope, out: torch.Tensor) -> None:
    """Copies segments one after the other into out [layers, 2, kv_heads, tokens, D], keys turned to their positions.

    Keys are turned in fp32 and rounded once, as they are where `attend` reads the segments themselves.
    """
    bases = np.array([segment.base for segment in segments], np.int64)
    by = upload(bases.repeat([len(segment) for segment in segments]), out.device)
    for number, layer in enumerate(out):  # one at a time, which stays in the caches
        parts = [widen(segment.kv[number, :, :, segment.start : segment.stop]).float() for segment in segments]
        keys, values = torch.cat(parts, dim=2)
        layer[0] = rope.shift(keys.transpose(0, 1), by).transpose(0, 1)
        layer[1] = values
