"""Turns plans into one forward pass: rows, positions, segments, masks. Computes nothing, decides nothing.

Invariant: row r of the pass is token `offset[r]` of block `block[r]` of its prompt, and each prompt is one group, so
what else is in the batch cannot change what a row sees.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from rcllm.core.ranking import ContentKey, IntArray, TokenIds
from rcllm.model.attend.segments import Group, Segment
from rcllm.model.decoder import Keep, Pass
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
) -> Assembled:
    """One pass for a batch of planned prompts; `kv` holds every block that their plans read.

    `going_on`: per prompt, whether decoding continues it, so that the KV of its fresh rows is kept too; empty: none.
    """
    tokens: list[int] = []
    positions: list[IntArray] = []
    groups: list[Group] = []
    wanted: list[int] = []
    keep: list[Keep] = []
    read_rows: list[IntArray] = []
    for planned in batch:
        group = _group(planned, kv)
        start = len(tokens)
        blocks = planned.prompt.blocks
        tokens.extend(blocks[b].token_ids[o] for b, o in zip(group.block.tolist(), group.offset.tolist(), strict=True))
        bases = np.array([block.base for block in blocks], dtype=np.int32)
        positions.append(bases[group.block] + group.offset)
        row_of = {
            place: start + row
            for row, place in enumerate(zip(group.block.tolist(), group.offset.tolist(), strict=True))
        }
        rows = [row_of[read.block, read.offset] for read in planned.prompt.reads]
        distinct = {row: len(wanted) + i for i, row in enumerate(dict.fromkeys(rows))}
        wanted.extend(distinct)
        read_rows.append(np.array([distinct[row] for row in rows], dtype=np.int32))
        for index in planned.plan.publish:
            first = row_of[index, 0]
            keep.append(Keep(first, first + len(blocks[index]), blocks[index].base))
        groups.append(group)
    fresh = [
        runs if goes_on else ()
        for runs, goes_on in zip(_fresh_runs(batch), going_on or [False] * len(batch), strict=True)
    ]
    work = Pass(
        torch.tensor(tokens, dtype=torch.int64, device=device),
        torch.from_numpy(np.concatenate(positions).astype(np.int64)).to(device),
        groups,
        torch.tensor(wanted, dtype=torch.int64, device=device),
        [*keep, *(run for runs in fresh for run in runs)],
    )
    return Assembled(work, tuple(read_rows), len(keep), tuple(fresh))


def _fresh_runs(batch: Sequence[Planned]) -> list[tuple[Keep, ...]]:
    """Per prompt, its fresh rows in the pass, as runs of tokens that follow each other, in one block or across several.

    A run is as long as it can be: whoever reads the KV of the rows pays for each run, and a history of 250 events that
    were all computed is one.
    """
    runs: list[tuple[Keep, ...]] = []
    row = 0
    for planned in batch:
        starts: list[tuple[int, int]] = []  # the first row of each run, and its position
        end = -1  # the position behind the last row, unless something cached lies there
        for piece in planned.plan.pieces:
            if piece.key is not None:
                end = -1
                continue
            position = planned.prompt.blocks[piece.block].base + piece.start
            if position != end:
                starts.append((row, position))
            row += len(piece)
            end = position + len(piece)
        stops = [*(start for start, _ in starts), row][1:]
        runs.append(tuple(Keep(start, stop, base) for (start, base), stop in zip(starts, stops, strict=True)))
    return runs


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
        torch.tensor([token for block in blocks for token in block], dtype=torch.int64, device=device),
        torch.from_numpy(np.concatenate(offsets).astype(np.int64) + num_context).to(device),
        [
            Group(segments, np.ones(length, np.int32), offset, sees)
            for length, offset in zip(lengths, offsets, strict=True)
        ],
        torch.empty(0, dtype=torch.int64, device=device),
        [Keep(int(end) - length, int(end), num_context) for end, length in zip(ends, lengths, strict=True)],
    )


def _group(planned: Planned, kv: Mapping[ContentKey, torch.Tensor]) -> Group:
    prompt = planned.prompt
    fresh = [piece for piece in planned.plan.pieces if piece.key is None]
    segments = tuple(
        Segment(kv[piece.key], prompt.blocks[piece.block].base, piece.start, piece.stop, piece.block)
        for piece in planned.plan.pieces
        if piece.key is not None
    )
    block = np.repeat(np.array([p.block for p in fresh], np.int32), [len(p) for p in fresh])
    offset = np.concatenate([np.arange(p.start, p.stop, dtype=np.int32) for p in fresh])
    return Group(segments, block, offset, prompt.sees)
