"""What attention gives and takes, whichever backend computes it.

    attend(layer, qkv) -> (output, logsumexp)        lse = log Σ_s exp(lse_s),  out = Σ_s exp(lse_s - lse) · out_s

Knows nothing of blocks' meaning, content keys or eviction. Invariant: all backends compute the same function, that of
`tests/reference/attend.py`, the slow, obvious fp64 twin.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple, Protocol

import torch


class Attended(NamedTuple):
    output: torch.Tensor  # [rows, H·D]
    lse: torch.Tensor  # [rows, H], natural logarithm, fp32


class Attend(Protocol):
    """One forward pass's attention, prepared once for all layers. `qkv` [rows, (H + 2·KV)·D] is already turned."""

    name: str

    @property
    def bytes_copied(self) -> int:
        """Bytes of published KV that were copied or converted to another buffer so far."""

    def __call__(self, layer: int, qkv: torch.Tensor) -> Attended: ...


class Beside(Protocol):
    """More keys that rows of a pass attend to, each row its own: what beams keep of their steps, for example."""

    @property
    def state(self) -> Hashable:
        """As long as it is equal, a call does the same to the same memory; so a pass with it may be replayed."""

    def join(self, layer: int, qkv: torch.Tensor, attended: Attended) -> None:
        """Joins attention over those keys to what rows got of others, in place; qkv [rows, (H + 2·KV)·D] is turned."""


def merge(parts: Sequence[Attended]) -> Attended:
    """Joins attention over disjoint sets of keys; rows that saw nothing in a part have lse -inf there."""
    lses = torch.stack([part.lse for part in parts])  # [parts, rows, H]
    lse = torch.logsumexp(lses, dim=0)
    weights = torch.exp(lses - lse.masked_fill(lse == -math.inf, 0.0))
    outputs = torch.stack([part.output.float().unflatten(1, (lse.shape[1], -1)) for part in parts])
    merged = (weights[..., None] * outputs).sum(0).flatten(1)
    return Attended(merged.to(parts[0].output.dtype), lse)
