"""Which prompts of a batch go through the layers together. Computes nothing.

Invariant: every prompt is in exactly one part, and a part has prompts of one kind, whose rows and KV fit; a prompt that
fits alone nowhere is tried alone.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass

from rcllm.core.ranking import ContentKey
from rcllm.reuse.plan import Planned
from rcllm.reuse.select import max_rows


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one part."""

    rows: int
    kv_bytes: int
    kv_bytes_per_token: int


def parts(batch: Sequence[Planned], kind: Callable[[Planned], Hashable], limits: Limits) -> Iterator[list[int]]:
    """Indices into `batch`, in its order within each kind."""
    kinds: dict[Hashable, list[int]] = {}
    for i, planned in enumerate(batch):
        kinds.setdefault(kind(planned), []).append(i)
    for indices in kinds.values():
        yield from _fitting(batch, indices, limits)


def _fitting(batch: Sequence[Planned], indices: Sequence[int], limits: Limits) -> Iterator[list[int]]:
    part, rows, needed = list[int](), 0, dict[ContentKey, int]()
    for i in indices:
        planned = batch[i]
        num_rows = max_rows(planned)
        keys = {p.key: len(planned.prompt.blocks[p.block]) for p in planned.plan.pieces if p.key is not None}
        kv_bytes = sum((needed | keys).values()) * limits.kv_bytes_per_token
        if part and (rows + num_rows > limits.rows or kv_bytes > limits.kv_bytes):
            yield part
            part, rows, needed = [], 0, {}
        part, rows, needed = [*part, i], rows + num_rows, needed | keys
    if part:
        yield part
