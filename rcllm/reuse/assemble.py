"""Turns plans into one forward pass: rows, positions, segments, masks. Computes nothing, decides nothing.

Invariant: row r of the pass is token `offset[r]` of block `block[r]` of its prompt, and each prompt is one group, so
what else is in the batch cannot change what a row sees.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from rcllm.core.ranking import ContentKey, IntArray, TokenIds
from rcllm.model.arrivals import Arrivals
from rcllm.model.attend.segments import Group, Segment
from rcllm.model.decoder import Keep, Pass
from rcllm.model.upload import upload
from rcllm.reuse.plan import Planned


@dataclass(frozen=True, slots=True)
class Assembled:
    """A pass, and where in it each prompt finds what it asked for."""

    work: Pass
    read_rows: tuple[IntArray, ...]  # per prompt, for each of its reads, the index into the wanted rows
    num_published: int  # the first so many that the pass keeps, to be published
    fresh: tuple[tuple[Keep, ...], ...] = ()  # then, per prompt that goes on, its fresh rows; none for the others


def assemble(
    batch: Sequence[Planned],
    kv: Mapping[ContentKey, torch.Tensor],
    device: torch.device,
    going_on: Sequence[bool] = (),
    arrivals: Sequence[Arrivals] = (),
) -> Assembled:
    """One pass for a batch of planned prompts; `kv` holds every block that their plans read.

    `arrivals`: of those blocks that are still on their way.
    `going_on`: per prompt, whether decoding continues it, so that the KV of its fresh rows is kept too; empty: none.
    """
    rows = _Rows()
    firsts = [rows.add(planned) for planned in batch]
    starts, stops = rows.starts, [*rows.starts[1:], len(rows.tokens)]
    wanted: list[int] = []
    read_rows: list[IntArray] = []
    keep: list[Keep] = []
    fresh: list[tuple[Keep, ...]] = []
    for planned, first, start, goes_on in zip(batch, firsts, starts, going_on or [False] * len(batch), strict=True):
        asked = [first[read.block] + read.offset for read in planned.prompt.reads]
        distinct = {row: len(wanted) + i for i, row in enumerate(dict.fromkeys(asked))}
        wanted += distinct
        read_rows.append(np.array([distinct[row] for row in asked], dtype=np.int32))
        blocks = [(first[index], planned.prompt.blocks[index]) for index in planned.plan.publish]
        keep += [Keep(row, row + len(block), block.base) for row, block in blocks]
        fresh.append(tuple(_fresh_runs(planned, start)) if goes_on else ())
    block, offset, positions = rows.columns()
    numbers = np.concatenate([np.array(each, dtype=np.int64) for each in (rows.tokens, positions, wanted)])
    token_ids, on_device, wanted_rows = upload(numbers, device).split([len(block), len(block), len(wanted)])
    groups = [
        Group(_segments(planned, kv), block[start:stop], offset[start:stop], planned.prompt.sees)
        for planned, start, stop in zip(batch, starts, stops, strict=True)
    ]
    kept = [*keep, *(run for runs in fresh for run in runs)]
    work = Pass(token_ids, on_device, groups, wanted_rows, kept, arrivals=arrivals)
    return Assembled(work, tuple(read_rows), len(keep), tuple(fresh))


class _Rows:
    """The fresh tokens of a batch, prompt after prompt, as runs of tokens of one block."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.starts: list[int] = []  # of each prompt, its first row
        self._blocks: list[int] = []  # of each run, as the next three
        self._bases: list[int] = []  # position of the block's token 0
        self._offsets: list[int] = []  # of the run's first token in its block
        self._lengths: list[int] = []

    def add(self, planned: Planned) -> dict[int, int]:
        """By block, the row of its token 0, were that in the last of the block's runs."""
        self.starts.append(len(self.tokens))
        blocks, first = planned.prompt.blocks, dict[int, int]()
        for piece in planned.plan.pieces:
            if piece.key is None:
                block = blocks[piece.block]
                first[piece.block] = len(self.tokens) - piece.start
                self.tokens += block.token_ids[piece.start : piece.stop]
                self._blocks.append(piece.block)
                self._bases.append(block.base)
                self._offsets.append(piece.start)
                self._lengths.append(piece.stop - piece.start)
        return first

    def columns(self) -> tuple[IntArray, IntArray, IntArray]:
        """Of each row its block, its offset in that, and its position; [rows] each."""
        lengths = np.array(self._lengths, dtype=np.int32)
        starts = np.cumsum(lengths, dtype=np.int32) - lengths
        shift = np.array(self._offsets, dtype=np.int32) - starts
        offset = np.repeat(shift, lengths) + np.arange(len(self.tokens), dtype=np.int32)
        block, base = (np.repeat(np.array(each, dtype=np.int32), lengths) for each in (self._blocks, self._bases))
        return block, offset, base + offset


def _segments(planned: Planned, kv: Mapping[ContentKey, torch.Tensor]) -> tuple[Segment, ...]:
    blocks = planned.prompt.blocks
    return tuple(
        Segment(kv[piece.key], blocks[piece.block].base, piece.start, piece.stop, piece.block)
        for piece in planned.plan.pieces
        if piece.key is not None
    )


def _fresh_runs(planned: Planned, row: int) -> Iterator[Keep]:
    """A prompt's fresh rows from `row` on, as runs of tokens that follow each other, in one block or across several.

    A run is as long as it can be: whoever reads the KV of the rows pays for each run, and a history of 250 events that
    were all computed is one.
    """
    start, base, end = row, 0, -1  # of the run; its end: the position behind its last row
    for piece in planned.plan.pieces:
        position = planned.prompt.blocks[piece.block].base + piece.start
        if start < row and (piece.key is not None or position != end):
            yield Keep(start, row, base)
            start = row
        if piece.key is None:
            base = position if start == row else base
            row, end = row + len(piece), position + len(piece)
    if start < row:
        yield Keep(start, row, base)


def assemble_blocks(
    blocks: Sequence[TokenIds], context: torch.Tensor | None, num_context: int, device: torch.device
) -> Pass:
    """One pass that computes many blocks, each after the same context and unseen by the others."""
    lengths = [len(block) for block in blocks]
    ends = np.cumsum(lengths)
    offsets = [np.arange(length, dtype=np.int32) for length in lengths]
    sees = np.array([[False, False], [True, False]])
    segments = () if context is None else (Segment(context, 0, 0, num_context, block=0),)
    return Pass(
        upload(np.array([token for block in blocks for token in block], np.int64), device),
        upload(np.concatenate(offsets).astype(np.int64) + num_context, device),
        [
            Group(segments, np.ones(length, np.int32), offset, sees)
            for length, offset in zip(lengths, offsets, strict=True)
        ],
        torch.empty(0, dtype=torch.int64, device=device),
        [Keep(int(end) - length, int(end), num_context) for end, length in zip(ends, lengths, strict=True)],
    )
