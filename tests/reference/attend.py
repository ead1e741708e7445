"""The slow, obvious twin of `rcllm.model.attend.choose`: fp64, every key turned to its place, one row at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from rcllm.model.attend.contract import Attended
from rcllm.model.attend.segments import Group
from rcllm.model.frequencies import inverse_frequencies
from rcllm.model.spec import ModelSpec
from tests.reference import kv_int8


def over(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> Attended:
    """One row's attention; q [H, D] over keys and values [seen, H, D]."""
    scores = (q * keys).sum(-1) / math.sqrt(q.shape[-1])  # [seen, H]
    return Attended((torch.softmax(scores, 0)[..., None] * values).sum(0).flatten(), torch.logsumexp(scores, 0))


def attend(
    spec: ModelSpec,
    groups: Sequence[Group],
    layer: int,
    qkv: torch.Tensor,
    row_over: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Attended] = over,
) -> Attended:
    """qkv [rows, (H + 2·KV)·D], turned to its positions, in any dtype. `row_over`: how one row attends."""
    heads = qkv.double().unflatten(1, (-1, spec.head_dim))
    q, k, v = heads.split((spec.num_heads, spec.num_kv_heads, spec.num_kv_heads), dim=1)
    outputs, lses = [], []
    start = 0
    for group in groups:
        fresh = slice(start, start + group.num_rows)
        keys, values, places = (
            [k[fresh]],
            [v[fresh]],
            list(zip(group.block.tolist(), group.offset.tolist(), strict=True)),
        )
        for segment in group.segments:
            kept = segment.kv[layer, :, :, segment.start : segment.stop]
            cached = (kv_int8.widen(kept) if kept.dtype == torch.int8 else kept.double()).transpose(1, 2)
            keys.append(turn(spec, cached[0], segment.base))
            values.append(cached[1])
            places += [(segment.block, place) for place in range(segment.start, segment.stop)]
        share = spec.num_heads // spec.num_kv_heads
        all_keys, all_values = (torch.cat(x).repeat_interleave(share, dim=1) for x in (keys, values))  # [keys, H, D]
        for row in range(group.num_rows):
            seen = [i for i, (block, offset) in enumerate(places) if _sees(group, row, block, offset)]
            found = row_over(q[start + row], all_keys[seen], all_values[seen])
            outputs.append(found.output)
            lses.append(found.lse)
        start += group.num_rows
    return Attended(torch.stack(outputs), torch.stack(lses))


def _sees(group: Group, row: int, block: int, offset: int) -> bool:
    """A row sees what precedes it in its own block, itself included, and all of the blocks that its block sees."""
    if group.block[row] == block:
        return bool(offset <= group.offset[row])
    return bool(group.sees[group.block[row], block])


def turn(spec: ModelSpec, x: torch.Tensor, by: int) -> torch.Tensor:
    """R(by) x for [..., D], in fp64."""
    angles = by * inverse_frequencies(spec.rope, spec.head_dim)[0].double()
    low, high = x.chunk(2, dim=-1)
    return torch.cat((low * angles.cos() - high * angles.sin(), high * angles.cos() + low * angles.sin()), dim=-1)
