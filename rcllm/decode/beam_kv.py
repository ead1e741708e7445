"""What beams read: the prompt, one for all of them, and a fixed buffer of their own few steps beside it.

Decides nothing: which beam goes on from which is told to it. Invariant: row r of the buffer holds the keys and values
of the steps of beam r; buffers are allocated once, and beams move inside them.
Source: xGR (arXiv 2512.11529), shared and unshared KV, staged attention merged by logsumexp.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from rcllm.core.ranking import IntArray
from rcllm.late import Late
from rcllm.model.attend.contract import Attended, merge
from rcllm.model.attend.on_triton import triton_fits
from rcllm.model.attend.segments import Group, Segment, copy_segments
from rcllm.model.attend.triton_way import head_constants
from rcllm.model.kv_int8 import num_values
from rcllm.model.rope import Rope
from rcllm.model.spec import ModelSpec

_KERNELS = Late("rcllm.decode.beam_kernels")  # triton is optional
SCRAP = 32  # tokens of a segment, on average, below which a prompt is joined before beams read it again and again


class StepBuffer:
    """KV of the steps of up to `num_rows` beams, of all requests of a batch; [layers, 2, rows, steps, kv_heads, D].

    Keys are turned to their positions. Also the `Beside` of the passes that read it.
    """

    def __init__(
        self, spec: ModelSpec, num_rows: int, num_steps: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._spec = spec
        shape = (spec.num_layers, 2, num_rows, num_steps, spec.num_kv_heads, spec.head_dim)
        self._kv = torch.empty(shape, dtype=dtype, device=device)
        self.num_rows, self.num_steps = 0, 0  # in use
        self._is_fused = device.type == "cuda" and triton_fits(spec, device)

    def fits(self, num_rows: int) -> bool:
        return num_rows <= self._kv.shape[2]

    def clear(self) -> None:
        self.num_rows, self.num_steps = 0, 0

    @property
    def state(self) -> tuple[int, int, int]:
        return self._kv.data_ptr(), self.num_rows, self.num_steps

    @property
    def num_bytes_per_row(self) -> int:
        """Of the steps in use, which a pass reads once."""
        return self._kv[:, :, :1, : self.num_steps].numel() * self._kv.element_size()

    @torch.inference_mode()
    def append(self, kv: torch.Tensor) -> None:
        """One more step of every beam; kv [layers, 2, kv_heads, rows, D], keys turned to their positions."""
        self.num_rows = kv.shape[3]
        self._kv[:, :, : self.num_rows, self.num_steps] = kv.transpose(2, 3)
        self.num_steps += 1

    @torch.inference_mode()
    def reorder(self, parents: IntArray | torch.Tensor) -> None:
        """Beam i goes on from beam parents[i]; `parents` never fall, over all requests of the batch.

        A tensor on the device is not looked at: all beams are copied out and back, not those alone that move.
        """
        used, self.num_rows = self._kv[:, :, :, : self.num_steps], len(parents)
        if not self.num_steps:
            return
        if isinstance(parents, torch.Tensor):
            used[:, :, : self.num_rows] = used.index_select(2, parents)
        else:
            reorder_in_place(used, parents, dim=2)

    def join(self, layer: int, qkv: torch.Tensor, attended: Attended) -> None:
        """Joins the attention of every beam over its own earlier steps to what it got of the prompt, in place."""
        if self._is_fused:
            self._join_fused(layer, qkv, attended)
            return
        both = merge([attended, self(layer, qkv)])
        attended.output.copy_(both.output)
        attended.lse.copy_(both.lse)

    def _join_fused(self, layer: int, qkv: torch.Tensor, attended: Attended) -> None:
        """In one launch."""
        spec, (_, _, rows, steps, *_) = self._spec, self._kv.shape
        _KERNELS.join_steps_kernel[self.num_rows, spec.num_kv_heads](
            *(qkv, *attended, self._kv, layer, self.num_steps, rows, steps),
            *(1 / math.sqrt(spec.head_dim), qkv.stride(0)),
            **head_constants(spec),
        )

    def __call__(self, layer: int, qkv: torch.Tensor) -> Attended:
        """Attention of every beam over its own earlier steps, in fp32 inside."""
        spec = self._spec
        share = spec.num_heads // spec.num_kv_heads
        keys, values = self._kv[layer, :, : self.num_rows, : self.num_steps].float()  # [rows, steps, KV, D]
        q = qkv[:, : spec.q_size].float().view(-1, spec.num_kv_heads, share, spec.head_dim)
        scores = torch.einsum("rgsd,rtgd->rgst", q, keys) / math.sqrt(spec.head_dim)
        lse = torch.logsumexp(scores, dim=-1)  # [rows, KV, share]
        output = torch.einsum("rgst,rtgd->rgsd", torch.exp(scores - lse[..., None]), values)
        return Attended(output.flatten(1).to(qkv.dtype), lse.flatten(1))


def joined(segments: tuple[Segment, ...], rope: Rope, dtype: torch.dtype) -> tuple[Segment, ...]:
    """The same tokens as one segment, where they lie in scraps: every step of every layer would pay for each scrap."""
    num_tokens = sum(map(len, segments))
    if len(segments) == 1 or num_tokens >= SCRAP * len(segments):
        return segments
    of = segments[0].kv
    kv = torch.empty((*of.shape[:3], num_tokens, num_values(of)), dtype=dtype, device=of.device)
    copy_segments(segments, rope, kv)
    return (Segment(kv, 0, 0, num_tokens, 0),)


def beam_group(segments: Sequence[Segment], num_beams: int) -> Group:
    """The beams of one request: each sees the whole prompt and itself, none of the others."""
    count = len(segments)
    sees = np.zeros((count + num_beams,) * 2, dtype=np.bool_)
    sees[count:, :count] = True
    blocks = np.arange(count, count + num_beams, dtype=np.int32)
    return Group(tuple(segments), blocks, np.zeros(num_beams, np.int32), sees)


def reorder_in_place(buffer: torch.Tensor, parents: IntArray, dim: int = 0, scratch_rows: int = 64) -> None:
    """Row i of `buffer` along `dim` becomes what row parents[i] was; `parents` never fall.

    Rows that come from the right are filled by rising number, then those from the left by falling number, so that none
    is overwritten before it is read; at most `scratch_rows` are held beside the buffer. Wrong for other `parents`.
    """
    assert (np.diff(parents) >= 0).all(), f"parents must never fall: {parents}"
    assert len(parents) <= buffer.shape[dim], f"{len(parents)} rows do not fit the buffer's {buffer.shape[dim]}"
    rows = np.arange(len(parents))
    rising, falling = rows[parents > rows], rows[parents < rows][::-1]
    for moved in (rising, falling):
        for start in range(0, len(moved), scratch_rows):
            some = moved[start : start + scratch_rows].copy()
            sources = torch.from_numpy(parents[some].astype(np.int64)).to(buffer.device)
            buffer.index_copy_(dim, torch.from_numpy(some).to(buffer.device), buffer.index_select(dim, sources))
