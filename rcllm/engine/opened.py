"""Prompts that decoding continues: all of their KV is at hand, as segments, and the next token is to be chosen.

Knows nothing of how tokens are chosen (`decode/`). Invariant: the segments of an opened prompt hold every one of its
tokens once, so that rows which see all of them continue the prompt as a full prefill would, at level `exact`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import torch

from rcllm.core.ranking import ContentKey
from rcllm.model.attend.segments import Segment
from rcllm.model.decoder import Keep, Passed
from rcllm.reuse.assemble import Assembled, fresh_runs
from rcllm.reuse.plan import Planned


@dataclass(frozen=True, slots=True)
class Opened:
    """One prompt, computed or found."""

    planned: Planned
    segments: tuple[Segment, ...]  # all tokens of the prompt; `block` is the number of the segment
    end: int  # position of the next token
    hidden: torch.Tensor  # [d], of the last token, after the final norm


@dataclass(frozen=True, slots=True)
class OpenedBatch:
    """What `Engine.open` yields."""

    prompts: tuple[Opened, ...]
    stage_ms: Mapping[str, float]
    num_computed: int  # tokens of missing blocks that were computed and published for the batch
    bytes_copied: int
    backend: str


def keeping_fresh(assembled: Assembled, batch: Sequence[Planned]) -> Assembled:
    """The same pass, which also keeps the KV of all fresh rows."""
    fresh = tuple(keep for runs in fresh_runs(batch) for keep in runs)
    return replace(assembled, work=replace(assembled.work, keep=(*assembled.work.keep, *fresh)))


def opened(
    batch: Sequence[Planned], blocks: Mapping[ContentKey, torch.Tensor], assembled: Assembled, passed: Passed
) -> tuple[Opened, ...]:
    """Joins what was reused and what was kept of a pass that `keeping_fresh` made."""
    runs = fresh_runs(batch)
    kept = passed.kept[len(passed.kept) - sum(map(len, runs)) :]
    bounds = pairwise(accumulate((len(each) for each in runs), initial=0))
    return tuple(
        Opened(
            planned,
            tuple(_segments(planned, blocks, run, kept[start:stop])),
            max(block.base + len(block) for block in planned.prompt.blocks),
            passed.hidden[int(rows[0])],
        )
        for planned, run, (start, stop), rows in zip(batch, runs, bounds, assembled.read_rows, strict=True)
    )


def _segments(
    planned: Planned, blocks: Mapping[ContentKey, torch.Tensor], runs: Sequence[Keep], kept: Sequence[torch.Tensor]
) -> list[Segment]:
    fresh = iter(zip(runs, kept, strict=True))
    segments = []
    for number, piece in enumerate(planned.plan.pieces):
        if piece.key is None:
            run, kv = next(fresh)
            segments.append(Segment(kv.contiguous(), run.base, 0, len(piece), number))
        else:
            base = planned.prompt.blocks[piece.block].base
            segments.append(Segment(blocks[piece.key], base, piece.start, piece.stop, number))
    return segments
