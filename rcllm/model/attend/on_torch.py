"""Attention over segments in plain torch, on any device.

`gather` copies the segments into one buffer per layer and makes one fused call; `segmented` reads each where it lies
and merges by logsumexp.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from rcllm.model.attend.contract import Attended, merge
from rcllm.model.attend.segments import Group
from rcllm.model.kv_int8 import widen
from rcllm.model.rope import Rope
from rcllm.model.spec import ModelSpec


class TorchAttend:
    """What both torch backends share: the split of the groups, and the fresh part."""

    name = ""

    def __init__(self, spec: ModelSpec, rope: Rope, groups: Sequence[Group]) -> None:
        self.spec, self.rope, self.groups = spec, rope, groups
        self.bytes_copied = 0
        device = rope.cos.device
        self.masks = [
            (torch.from_numpy(g.segment_mask()).to(device), torch.from_numpy(g.row_mask()).to(device)) for g in groups
        ]

    def __call__(self, layer: int, qkv: torch.Tensor) -> Attended:
        spec = self.spec
        parts = []
        for group, masks, rows in zip(
            self.groups, self.masks, qkv.split([g.num_rows for g in self.groups]), strict=True
        ):
            heads = rows.unflatten(1, (-1, spec.head_dim))
            q, k, v = heads.split((spec.num_heads, spec.num_kv_heads, spec.num_kv_heads), dim=1)
            parts.append(self.attend_group(layer, group, masks, q, k, v))
        return Attended(torch.cat([p.output for p in parts]), torch.cat([p.lse for p in parts]))

    def attend_group(
        self,
        layer: int,
        group: Group,
        masks: tuple[torch.Tensor, torch.Tensor],
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
    ) -> Attended:
        """q [rows, H, D]; k, v [rows, KV, D]; masks [rows, segments] and [rows, rows]."""
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

    def attend_group(
        self,
        layer: int,
        group: Group,
        masks: tuple[torch.Tensor, torch.Tensor],
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
    ) -> Attended:
        sees_segment, sees_row = masks
        parts = [self.part(q, k, v, sees_row)]
        for i, segment in enumerate(group.segments):
            rows = sees_segment[:, i].nonzero()[:, 0]
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

    def attend_group(
        self,
        layer: int,
        group: Group,
        masks: tuple[torch.Tensor, torch.Tensor],
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
    ) -> Attended:
        sees_segment, mask = masks
        if group.segments:
            lengths = [len(s) for s in group.segments]
            cached = torch.cat([widen(s.kv[layer, :, :, s.start : s.stop]) for s in group.segments], dim=2)
            self.bytes_copied += sum(s.num_bytes for s in group.segments) // self.spec.num_layers
            keys, values = cached.to(q.dtype).transpose(1, 2)  # from [2, KV, keys, D]
            base = torch.tensor([s.base for s in group.segments], device=q.device)
            by = base.repeat_interleave(torch.tensor(lengths, device=q.device))
            k, v = torch.cat((self.rope.shift(keys, by), k)), torch.cat((values, v))
            mask = torch.cat(
                (sees_segment.repeat_interleave(torch.tensor(lengths, device=q.device), dim=1), mask), dim=1
            )
        attended = F.scaled_dot_product_attention(
            q.transpose(0, 1)[None],
            k.transpose(0, 1)[None],
            v.transpose(0, 1)[None],
            attn_mask=mask[None, None],
            enable_gqa=q.shape[1] != k.shape[1],
        )
        # the fused call keeps its logsumexp to itself; a pass over everything at once has nothing to merge with
        return Attended(attended[0].transpose(0, 1).flatten(1), q.new_full(q.shape[:2], math.nan))
