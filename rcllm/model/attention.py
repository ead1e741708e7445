"""The one primitive: fresh tokens attend to a list of segments and to each other.

    attend(layer, qkv) -> (output, logsumexp)        lse = log Σ_s exp(lse_s),  out = Σ_s exp(lse_s - lse) · out_s

Knows nothing of blocks' meaning, content keys or eviction. Invariant: all backends compute the same function, that of
`tests/reference/attend.py`, the slow, obvious fp64 twin.

`gather` copies the segments into one buffer per layer and makes one fused call; `segmented` reads each where it lies
and merges; both exist in torch and, for the CPU, compiled. `prepare` holds the rule.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from rcllm.core import BoolArray
from rcllm.model.native import Kernels
from rcllm.model.rope import Rope
from rcllm.model.segments import Group, Keys
from rcllm.model.spec import ModelSpec


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

    def __call__(self, layer: int, qkv: torch.Tensor) -> Attended:
        """Attention over those keys alone; `qkv` [rows, (H + 2·KV)·D] is already turned. Rows without any: lse -inf."""


def merge(parts: Sequence[Attended]) -> Attended:
    """Joins attention over disjoint sets of keys; rows that saw nothing in a part have lse -inf there."""
    lses = torch.stack([part.lse for part in parts])  # [parts, rows, H]
    lse = torch.logsumexp(lses, dim=0)
    weights = torch.exp(lses - lse.masked_fill(lse == -math.inf, 0.0))
    outputs = torch.stack([part.output.float().unflatten(1, (lse.shape[1], -1)) for part in parts])
    merged = (weights[..., None] * outputs).sum(0).flatten(1)
    return Attended(merged.to(parts[0].output.dtype), lse)


# ---- compiled -------------------------------------------------------------------------------------------------------

_DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


class NativeSegmented:
    """fp32 compute on the CPU over fp32, fp16 or bf16 segments, read in place: nothing is copied.

    Needs head_dim to be a multiple of 32 (whole vectors in each half of a head).
    """

    name = "segmented"
    bytes_copied = 0

    def __init__(self, spec: ModelSpec, rope: Rope, groups: Sequence[Group], kernels: Kernels) -> None:
        self._init(spec, rope, kernels, groups, [Keys.of(replace(group, segments=())) for group in groups])
        self._segments = self._segment_table(groups)

    def _init(
        self, spec: ModelSpec, rope: Rope, kernels: Kernels, groups: Sequence[Group], keys: Sequence[Keys]
    ) -> None:
        """`groups` with the segments that are read in place; `keys`: what lies in one buffer."""
        self._spec, self._rope, self._kernels = spec, rope, kernels
        self._num_groups = len(groups)
        self._groups = torch.from_numpy(_group_table(groups, keys))
        self._sees_segment = _flat_bytes([group.segment_mask() for group in groups])
        self._sees = _flat_bytes([group.sees for group in groups])
        rows = [np.column_stack([g.block, g.offset, g.reach(k)]) for g, k in zip(groups, keys, strict=True)]
        self._rows = torch.from_numpy(np.concatenate(rows).astype(np.int32))
        places = [np.column_stack([k.block, k.offset]) for k in keys]
        self._keys = torch.from_numpy(np.concatenate(places).astype(np.int32))

    def _segment_table(self, groups: Sequence[Group]) -> torch.Tensor:
        segments = [segment for group in groups for segment in group.segments]
        assert all(s.kv.is_contiguous() for s in segments), "KV blocks are contiguous"
        self._kv = [segment.kv for segment in segments]  # keeps the memory behind the pointers alive
        table = [(s.kv.data_ptr(), s.kv.shape[3], s.start, len(s), s.base, _DTYPE_CODES[s.kv.dtype]) for s in segments]
        return torch.tensor(table, dtype=torch.int64).reshape(-1, 6)

    def __call__(self, layer: int, qkv: torch.Tensor) -> Attended:
        return self._attend(layer, qkv, qkv[:, self._spec.q_size :])

    def _attend(self, layer: int, qkv: torch.Tensor, kv: torch.Tensor) -> Attended:
        """kv [keys, 2·KV·D]"""
        spec, rope = self._spec, self._rope
        output = qkv.new_empty(qkv.shape[0], spec.q_size)
        lse = qkv.new_empty(qkv.shape[0], spec.num_heads)
        scale = math.log2(math.e) / math.sqrt(spec.head_dim)  # the kernel's exponential is base 2
        inputs = (qkv, qkv.stride(0), kv, kv[:, spec.kv_size :], kv.stride(0))
        shape = (spec.num_heads, spec.num_kv_heads, spec.head_dim)
        tables = (
            self._groups,
            self._num_groups,
            self._segments,
            self._sees_segment,
            self._sees,
            self._rows,
            self._keys,
        )
        threads = torch.get_num_threads()
        self._kernels.call("attend", *inputs, output, lse, *shape, layer, scale, *tables, rope.cos, rope.sin, threads)
        return Attended(output, lse)


class NativeGather(NativeSegmented):
    """The same, over one buffer per layer that holds the keys of segments and fresh rows in the order of the prompt.

    For segments of few tokens: every softmax step reads and writes the whole output, however few keys it adds.
    """

    name = "gather"

    def __init__(self, spec: ModelSpec, rope: Rope, groups: Sequence[Group], kernels: Kernels) -> None:
        keys = [Keys.of(group) for group in groups]
        self._init(spec, rope, kernels, [replace(group, segments=()) for group in groups], keys)
        self._segments = self._segment_table(groups)
        starts = np.cumsum([0, *(len(k.block) for k in keys)]).tolist()
        self._where = torch.from_numpy(np.concatenate([k.segments + at for k, at in zip(keys, starts, strict=False)]))
        self._fresh = torch.from_numpy(np.concatenate([k.rows + at for k, at in zip(keys, starts, strict=False)]))
        self._buffer = torch.empty(starts[-1], 2 * spec.kv_size)
        self._layer_bytes = sum(s.num_bytes for group in groups for s in group.segments) // spec.num_layers
        self.bytes_copied = 0

    def __call__(self, layer: int, qkv: torch.Tensor) -> Attended:
        spec, rope, buffer = self._spec, self._rope, self._buffer
        shape = (spec.num_kv_heads, spec.head_dim, layer)
        target = (rope.cos, rope.sin, buffer, buffer.stride(0), torch.get_num_threads())
        self._kernels.call("gather", self._segments, len(self._segments), self._where, *shape, *target)
        buffer.index_copy_(0, self._fresh, qkv[:, spec.q_size :])
        self.bytes_copied += self._layer_bytes
        return self._attend(layer, qkv, buffer)


def _group_table(groups: Sequence[Group], keys: Sequence[Keys]) -> npt.NDArray[np.int64]:
    """[groups, 9]: first and number of rows, keys and segments, where the two masks start in the flat bytes, blocks."""
    counts = [(g.num_rows, len(k.block), len(g.segments)) for g, k in zip(groups, keys, strict=True)]
    masks = [(g.num_rows * len(g.segments), g.sees.size) for g in groups]
    sizes = np.column_stack([np.array(counts, dtype=np.int64), np.array(masks, dtype=np.int64)])
    starts = np.cumsum(sizes, axis=0) - sizes
    pairs = np.stack([starts[:, :3], sizes[:, :3]], axis=2).reshape(len(groups), 6)
    blocks = np.array([len(group.sees) for group in groups], dtype=np.int64)
    return np.ascontiguousarray(np.column_stack([pairs, starts[:, 3:], blocks]))


def _flat_bytes(masks: Sequence[BoolArray]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([np.ravel(mask) for mask in masks])).view(torch.uint8)


# ---- plain torch ----------------------------------------------------------------------------------------------------


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
            keys, values = segment.kv[layer, :, :, segment.start : segment.stop].transpose(1, 2)  # views [keys, KV, D]
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
            cached = torch.cat([s.kv[layer, :, :, s.start : s.stop] for s in group.segments], dim=2)  # [2, KV, keys, D]
            self.bytes_copied += cached.numel() * cached.element_size()
            keys, values = cached.to(q.dtype).transpose(1, 2)
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


# ---- choice ---------------------------------------------------------------------------------------------------------

TORCH_BACKENDS: dict[str, Callable[[ModelSpec, Rope, Sequence[Group]], Attend]] = {
    "gather": Gather,
    "segmented": Segmented,
}
BACKENDS = ("auto", *TORCH_BACKENDS)
SCRAP = 12  # tokens of a segment, on average, below which copying all first may pay


def native_fits(spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the compiled kernels compute this model: fp32, whole vectors in each half of a head, sane grouping."""
    grouped = spec.num_heads // spec.num_kv_heads <= 64
    return device.type == "cpu" and dtype == torch.float32 and spec.head_dim % 32 == 0 and grouped


def prepare(name: str, spec: ModelSpec, rope: Rope, groups: Sequence[Group], kernels: Kernels | None) -> Attend:
    """The attention of one pass. `name`: one of BACKENDS; `kernels`: None where they do not fit or do not exist.

    The measured rule (`python -m benchmarks.attend`): with kernels, `segmented` wins for whole blocks of every size; on
    torch alone `gather` does, because a launch per segment and layer costs more than the copy.
    """
    if name == "auto":
        name = "segmented" if kernels and not _scattered(groups) else "gather"
    if kernels:
        return (NativeSegmented if name == "segmented" else NativeGather)(spec, rope, groups, kernels)
    return TORCH_BACKENDS[name](spec, rope, groups)


def _scattered(groups: Sequence[Group]) -> bool:
    """Whether copying the segments first pays: scraps of blocks, most of which most rows see.

    Level `corrected` leaves such scraps between the tokens that it makes fresh. Where candidates are isolated a row
    sees few of them; `segmented` skips the others, `gather` computes and masks them (docs/log.md has the times).
    """
    segments = [segment for group in groups for segment in group.segments]
    num_blocks = sum(len({segment.block for segment in group.segments}) for group in groups)
    num_tokens = sum(map(len, segments))
    if len(segments) <= 1.5 * num_blocks or num_tokens >= SCRAP * len(segments):
        return False
    masks = [group.segment_mask() for group in groups]
    return sum(int(mask.sum()) for mask in masks) > 0.5 * sum(mask.size for mask in masks)
