"""The one primitive: fresh tokens attend to a list of segments and to each other.

    attend(layer, qkv) -> (output, logsumexp)        lse = log Σ_s exp(lse_s),  out = Σ_s exp(lse_s - lse) · out_s

A segment is cached KV at a place in this prompt: its keys are stored turned to their place within the block, and are
turned on by the segment's base when they are read. Knows nothing of blocks' meaning, keys or eviction. Invariant: all
backends compute the same function; `tests/reference/attend.py` is the slow, obvious fp64 twin.

`gather` copies the segments into one buffer per layer and makes one fused call; `segmented` reads each where it lies
and merges; on the CPU a compiled kernel does that tile by tile. `prepare` holds the measured rule.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from rcllm.core import BoolArray, IntArray
from rcllm.model.native import Kernels
from rcllm.model.rope import Rope
from rcllm.model.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens `start` to `stop` of one KV block, as one request sees them."""

    kv: torch.Tensor  # [layers, 2, kv_heads, block_len, head_dim]; contiguous; K turned to block-local positions
    base: int  # position of the block's token 0 in this prompt
    start: int
    stop: int
    block: int  # which block of the group it belongs to

    @property
    def num_bytes(self) -> int:
        return self.kv[:, :, :, self.start : self.stop].numel() * self.kv.element_size()


@dataclass(frozen=True, slots=True)
class Group:
    """Consecutive fresh rows that share segments; rows of different groups never see each other.

    Who sees whom is told by blocks: a row sees what precedes it in its own block, and all of the blocks that its block
    sees, fresh or cached.
    """

    segments: tuple[Segment, ...]
    block: IntArray  # [rows], block of each row; rows of one block are consecutive
    offset: IntArray  # [rows], place of each row within its block
    sees: BoolArray  # [blocks, blocks], strictly lower triangular

    @classmethod
    def causal(cls, num_rows: int) -> Group:
        """One plain sequence."""
        return cls((), np.zeros(num_rows, np.int32), np.arange(num_rows, dtype=np.int32), np.zeros((1, 1), bool))

    @property
    def num_rows(self) -> int:
        return len(self.block)

    def segment_mask(self) -> BoolArray:
        """[rows, segments]"""
        blocks = np.array([segment.block for segment in self.segments], dtype=np.int32)
        starts = np.array([segment.start for segment in self.segments], dtype=np.int32)
        own = (self.block[:, None] == blocks) & (starts < self.offset[:, None])
        return np.asarray(own | self.sees[self.block[:, None], blocks], dtype=np.bool_)

    def row_mask(self) -> BoolArray:
        """[rows, rows]"""
        own = (self.block[:, None] == self.block) & (self.offset <= self.offset[:, None])
        return np.asarray(own | self.sees[self.block[:, None], self.block], dtype=np.bool_)

    def reach(self) -> IntArray:
        """[rows, 3]: the first row that a row sees, one past the last (itself), and whether it sees all between."""
        count = np.bincount(self.block, minlength=len(self.sees))
        start = np.cumsum(count) - count
        row = np.arange(self.num_rows)
        seen = self.sees & (count > 0)
        first = np.minimum(np.where(seen, start, self.num_rows).min(axis=1), start)[self.block]
        num_seen = (seen @ count)[self.block] + row - start[self.block] + 1
        return np.stack([first, row + 1, num_seen == row + 1 - first], axis=1).astype(np.int32)


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


def merge(parts: Sequence[Attended]) -> Attended:
    """Joins attention over disjoint sets of keys; rows that saw nothing in a part have lse -inf there."""
    lses = torch.stack([part.lse for part in parts])  # [parts, rows, H]
    lse = torch.logsumexp(lses, dim=0)
    weights = torch.exp(lses - lse.masked_fill(lse == -math.inf, 0.0))
    outputs = torch.stack([part.output.float().unflatten(1, (lse.shape[1], -1)) for part in parts])
    merged = (weights[..., None] * outputs).sum(0).flatten(1)
    return Attended(merged.to(parts[0].output.dtype), lse)


# ---- compiled, in place ---------------------------------------------------------------------------------------------

_DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


class NativeSegmented:
    """fp32 compute on the CPU over fp32, fp16 or bf16 segments, read in place: nothing is copied.

    Needs head_dim to be a multiple of 32 (whole vectors in each half of a head).
    """

    name = "segmented"
    bytes_copied = 0

    def __init__(self, spec: ModelSpec, rope: Rope, groups: Sequence[Group], kernels: Kernels) -> None:
        self._spec, self._rope, self._kernels = spec, rope, kernels
        segments = [segment for group in groups for segment in group.segments]
        assert all(s.kv.is_contiguous() for s in segments), "KV blocks are contiguous"
        self._kv = [segment.kv for segment in segments]  # keeps the memory behind the pointers alive
        self._num_groups = len(groups)
        rows = [
            (s.kv.data_ptr(), s.kv.shape[3], s.start, s.stop - s.start, s.base, _DTYPE_CODES[s.kv.dtype])
            for s in segments
        ]
        self._segments = torch.tensor(rows, dtype=torch.int64).reshape(-1, 6)
        masks = [group.segment_mask() for group in groups]
        self._groups = torch.from_numpy(_group_table(groups))
        self._sees_segment = _flat_bytes(masks)
        self._sees = _flat_bytes([group.sees for group in groups])
        table = [np.column_stack([group.block, group.offset, group.reach()]) for group in groups]
        self._rows = torch.from_numpy(np.concatenate(table).astype(np.int32))

    def __call__(self, layer: int, qkv: torch.Tensor) -> Attended:
        spec, rope = self._spec, self._rope
        output = qkv.new_empty(qkv.shape[0], spec.q_size)
        lse = qkv.new_empty(qkv.shape[0], spec.num_heads)
        k, v = qkv[:, spec.q_size :], qkv[:, spec.q_size + spec.kv_size :]
        scale = math.log2(math.e) / math.sqrt(spec.head_dim)  # the kernel's exponential is base 2
        shape = (spec.num_heads, spec.num_kv_heads, spec.head_dim)
        tables = (self._groups, self._num_groups, self._segments, self._sees_segment, self._sees, self._rows)
        threads = torch.get_num_threads()
        self._kernels.call(
            "attend", qkv, k, v, qkv.shape[1], output, lse, *shape, layer, scale, *tables, rope.cos, rope.sin, threads
        )
        return Attended(output, lse)


def _group_table(groups: Sequence[Group]) -> npt.NDArray[np.int64]:
    """[groups, 7]: first row, rows, first segment, segments, where its two masks start in the flat bytes, blocks."""
    sizes = np.array(
        [(g.num_rows, len(g.segments), g.num_rows * len(g.segments), g.sees.size) for g in groups], dtype=np.int64
    )
    starts = np.cumsum(sizes, axis=0) - sizes
    blocks = np.array([len(group.sees) for group in groups], dtype=np.int64)
    columns: list[npt.NDArray[np.int64]] = [
        starts[:, 0],
        sizes[:, 0],
        starts[:, 1],
        sizes[:, 1],
        starts[:, 2],
        starts[:, 3],
        blocks,
    ]
    return np.ascontiguousarray(np.column_stack(columns))


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
            seen = torch.ones(len(rows), segment.stop - segment.start, dtype=torch.bool, device=q.device)
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
            lengths = [s.stop - s.start for s in group.segments]
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


def native_fits(spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the compiled kernels compute this model: fp32, whole vectors in each half of a head, sane grouping."""
    grouped = spec.num_heads // spec.num_kv_heads <= 64
    return device.type == "cpu" and dtype == torch.float32 and spec.head_dim % 32 == 0 and grouped


def prepare(name: str, spec: ModelSpec, rope: Rope, groups: Sequence[Group], kernels: Kernels | None) -> Attend:
    """The attention of one pass. `name`: one of BACKENDS; `kernels`: None where they do not fit or do not exist.

    The measured rule (`python -m benchmarks.attend`): with kernels, `segmented` wins at every size; on torch alone
    `gather` does, because a launch per segment and layer costs more than the copy.
    """
    if name == "auto":
        name = "segmented" if kernels else "gather"
    if kernels and name == "segmented":
        return NativeSegmented(spec, rope, groups, kernels)
    return TORCH_BACKENDS[name](spec, rope, groups)
