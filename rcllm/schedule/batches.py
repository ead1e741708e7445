"""Which searches run together: as few batches as the limits allow, in order of the requests. Never imports torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BeamLimits:
    """Of one batch; a request that exceeds them runs alone."""

    prompt_tokens: int = 2048
    beam_rows: int = 512  # beams of all its requests
    num_overlapped: int = 2  # batches that are under way at a time


@dataclass(frozen=True, slots=True)
class Load:
    """What one request brings."""

    prompt_tokens: int
    beam_rows: int


def beam_batches(loads: Sequence[Load], limits: BeamLimits) -> list[list[int]]:
    """Indices into `loads` in order, in as few batches as the limits allow without changing the order."""
    batches: list[list[int]] = []
    tokens = rows = 0
    for i, load in enumerate(loads):
        tokens, rows = tokens + load.prompt_tokens, rows + load.beam_rows
        if not batches or tokens > limits.prompt_tokens or rows > limits.beam_rows:
            batches.append([])
            tokens, rows = load.prompt_tokens, load.beam_rows
        batches[-1].append(i)
    return batches
