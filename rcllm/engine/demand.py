"""What a request asks of the device, in the terms of the cost model.

Knows plans and look-ups. Never imports torch. Invariant: the parts of a request are its prompt and each of its
candidates, and they add up to the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from rcllm.cache.lookup import Located
from rcllm.core.ranking import ContentKey, Piece
from rcllm.core.receipts import BlockKind
from rcllm.reuse.plan import Planned
from rcllm.reuse.select import evidence_of, is_inexact
from rcllm.schedule.cost import Demand, FloatArray

_PASSES, _ROWS, _MISSING, _KV_BYTES, _PAIRS = range(5)  # as in `Demand`


@dataclass(frozen=True, slots=True)
class Demands:
    """What one request asks for."""

    parts: FloatArray  # [1 + candidates, rates]: the prompt beside its candidates, then each of them
    whole: Demand
    fetch_ms: float  # until what lower tiers have is on the device, by their own estimate


def demands_of(
    planned: Planned, found: Mapping[ContentKey, Located], kv_bytes_per_token: int, num_layers: int
) -> Demands:
    """`found`: which tier has what the plan reads; what none has is computed first."""
    blocks, share = planned.prompt.blocks, _fresh_share(planned, num_layers)
    times = 2.0 if evidence_of(planned) == "blocks_pass" else 1.0  # that the fresh rows run
    parts = [[0.0] * 5 for _ in range(1 + planned.prompt.num_candidates)]
    parts[0][_PASSES] = times
    fetch_ms, counted = 0.0, {each.key for each in planned.borrowed.values()}  # what is borrowed is there
    for piece in planned.plan.pieces:
        block, size = blocks[piece.block], piece.stop - piece.start
        part = parts[0 if block.slot is None else 1 + block.slot]
        if rows := size * (times if piece.key is None else share(piece)):
            part[_ROWS] += rows
            part[_PAIRS] += rows * (block.base + piece.start + size / 2)  # a row attends to about what precedes it
        if piece.key is None:
            continue
        part[_KV_BYTES] += size * kv_bytes_per_token
        if piece.key in counted:
            continue
        counted.add(piece.key)
        if (there := found.get(piece.key)) is not None:
            fetch_ms += there.ms
        else:
            part[_MISSING] += len(block.token_ids)
    array = np.array(parts)
    return Demands(array, Demand(*array.sum(axis=0).tolist()), fetch_ms)


def _fresh_share(planned: Planned, num_layers: int) -> Callable[[Piece], float]:
    """How much of a reused piece runs through the layers; of what `corrected` has yet to choose, what it will."""
    evidence, level = evidence_of(planned), planned.level
    layers = planned.prompt.options.selection.check_layer + 1 if evidence == "check_layer" else 0
    before = layers / num_layers if evidence == "check_layer" else 0.0

    def share(piece: Piece) -> float:
        if evidence == "none" or not is_inexact(planned.prompt, piece):
            return before
        is_item = planned.prompt.blocks[piece.block].kind is BlockKind.ITEM
        return before + (1.0 - before) * (level.budget if is_item else level.history_budget)

    return share
