"""Attention over segments in plain torch, on any device.

`gather` copies the segments into one buffer per layer and makes one fused call; `segmented` reads each where it lies
and merges by logsumexp. Invariant: masks are sent once for all layers, and nothing in a layer waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from rcllm.model.attend.contract import Attended, merge
from rcllm.model.attend.segments import Group
from rcllm.model.kv_int8 import widen
from rcllm.model.rope import Rope
from rcllm.model.spec import ModelSpec
from rcllm.model.upload import upload


class TorchAttend:
    """What both torch backends share: the split of the groups, and the fresh part."""

    name = ""

    def __init__(self, spec: ModelSpec, rope: Rope, groups: Sequence[Group]) -> None:
        self.spec, self.rope, self.groups = spec, rope, groups
        self.bytes_copied = 0
        self.device = rope.cos.device

    def __call__(self, layer: int, qkv: torch.Tensor) -> Attended:
        spec = self.spec
        parts = []
        for number, rows in enumerate(qkv.split([g.num_rows for g in self.groups])):
            heads = rows.unflatten(1, (-1, spec.head_dim))
            q, k, v = heads.split((spec.num_heads, spec.num_kv_heads, spec.num_kv_heads), dim=1)
            parts.append(self.attend_group(layer, number, q, k, v))
        return Attended(torch.cat([p.output for p in parts]), torch.cat([p.lse for p in parts]))

    def attend_group(self, layer: int, number: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Attended:
        """Of the group with this number; q [rows, H, D]; k, v [rows, KV, D]."""
        raise NotImplementedError

    def part(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> Attended:
        """q [rows, H, D] over k, v [keys, KV, D] where mask [rows, keys]; in fp32 inside."""
        spec = self.spec
        share = spec.num_heads // spec.num_kv_heads
        grouped = q.float().unflatten(1, (spec.num_kv_heads, share))  # [rows, KV, share, D]
        scores = torch.einsum("rgsd,kgd->rgsk", grouped, k.float()) / math.sqrt(spec.head_dim)
        scores = scores.masked_fill(~mask[:, None, None, :], -math.inf)
        lse = torch.logsumexp(scores, dim=-1)  # [rows, KV, share]
        weights = torch.exp(scores - lse.masked_fill(lse == -math.inf, 0.0)[..., None])
        output = torch.einsum("rgsk,kgd->rgsd", weights, v.float())
        return Attended(output.flatten(1).to(q.dtype), lse.flatten(1))


class Segmented(TorchAttend):
    """Reads each segment where it lies: turns the few queries back by its base, and merges by logsumexp."""

    name = "segmented"

    def __init__(self, spec: ModelSpec, rope: Rope, groups: Sequence[Group]) -> None:
        super().__init__(spec, rope, groups)
        self._row_masks = [upload(group.row_mask(), self.device) for group in groups]
        self._seers = [  # per group and segment, the rows that see it
            [upload(np.flatnonzero(seen), self.device) for seen in group.segment_mask().T] for group in groups
        ]

    def attend_group(self, layer: int, number: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Attended:
        parts = [self.part(q, k, v, self._row_masks[number])]
        for segment, rows in zip(self.groups[number].segments, self._seers[number], strict=True):
            if not len(rows):
                continue
            back = torch.full((len(rows),), -segment.base, device=q.device)
            cached = widen(segment.kv[layer, :, :, segment.start : segment.stop])
            keys, values = cached.transpose(1, 2)  # [keys, KV, D], views unless they are kept in int8
            seen = torch.ones(len(rows), len(segment), dtype=torch.bool, device=q.device)
            some = self.part(self.rope.shift(q[rows], back), keys, values, seen)
            output, lse = torch.zeros_like(parts[0].output), torch.full_like(parts[0].lse, -math.inf)
            output[rows], lse[rows] = some.output, some.lse
            parts.append(Attended(output, lse))
        return merge(parts)


class Gather(TorchAttend):
    """Copies the segments into one buffer per layer, shifts their keys, and makes one fused call."""

    name = "gather"

    def __init__(self, spec: ModelSpec, rope: Rope, groups: Sequence[Group]) -> None:
        super().__init__(spec, rope, groups)
        self._masks, self._bases = list[torch.Tensor](), list[torch.Tensor]()  # [rows, keys and rows]; [keys]
        for group in groups:
            lengths = [len(segment) for segment in group.segments]
            sees_keys = np.repeat(group.segment_mask(), lengths, axis=1)
            bases = np.array([segment.base for segment in group.segments], np.int64)
            self._masks.append(upload(np.concatenate([sees_keys, group.row_mask()], axis=1), self.device))
            self._bases.append(upload(np.repeat(bases, lengths), self.device))

    def attend_group(self, layer: int, number: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Attended:
        segments, mask = self.groups[number].segments, self._masks[number]
        if segments:
            cached = torch.cat([widen(s.kv[layer, :, :, s.start : s.stop]) for s in segments], dim=2)
            self.bytes_copied += sum(s.num_bytes for s in segments) // self.spec.num_layers
            keys, values = cached.to(q.dtype).transpose(1, 2)  # from [2, KV, keys, D]
            k, v = torch.cat((self.rope.shift(keys, self._bases[number]), k)), torch.cat((values, v))
        attended = F.scaled_dot_product_attention(
            q.transpose(0, 1)[None],
            k.transpose(0, 1)[None],
            v.transpose(0, 1)[None],
            attn_mask=mask[None, None],
            enable_gqa=q.shape[1] != k.shape[1],
        )
        # the fused call keeps its logsumexp to itself; a pass over everything at once has nothing to merge with
        return Attended(attended[0].transpose(0, 1).flatten(1), q.new_full(q.shape[:2], math.nan))
