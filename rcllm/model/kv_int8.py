"""KV kept in int8: levels, and behind those of a row the scales that they were divided by.

    row of a token and head:  head_dim levels | one scale in bf16 for each GROUP of them        all of it torch.int8

Knows nothing of pools, tiers or attention. Invariants: a block is one tensor and its tokens are sliced as in any other
dtype; a value differs from what was quantised by half a step of its group, which is 1/254 of the largest value there.
A scale has 8 bits and a level 7, so a widened value is their exact product, whoever computes it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from rcllm.model.spec import INT8_GROUP as GROUP
from rcllm.model.spec import kv_row_bytes

_SCALE_BYTES = 2
_CHUNK = 32  # tokens that are quantised at once: what is between stays in the caches


def quantise(kv: torch.Tensor) -> torch.Tensor:
    """[…, len, head_dim] in floats → […, len, columns] in int8, contiguous. A group with NaN or infinity is all NaN."""
    return fill(empty_for(kv, torch.int8, kv.device), kv)


def _quantise(kv: torch.Tensor, block: torch.Tensor) -> None:
    head_dim = kv.shape[-1]
    num_groups = -(-head_dim // GROUP)
    values = F.pad(kv.float(), (0, num_groups * GROUP - head_dim)).unflatten(-1, (num_groups, GROUP))
    scales = (values.abs().amax(-1) / 127).bfloat16().clone(memory_format=torch.contiguous_format)
    levels = (values / scales.float()[..., None]).nan_to_num_(0.0).round_().clamp_(-127, 127)
    block[..., :head_dim] = levels.flatten(-2)[..., :head_dim]
    block[..., head_dim:] = scales.view(torch.int8)


def widen(block: torch.Tensor) -> torch.Tensor:
    """[…, columns] in int8 → […, head_dim] in fp32; what is in floats already comes back as it is."""
    if block.dtype != torch.int8:
        return block
    head_dim = num_values(block)
    scales = block[..., head_dim:].clone(memory_format=torch.contiguous_format).view(torch.bfloat16).float()
    return block[..., :head_dim].float() * scales.repeat_interleave(GROUP, dim=-1)[..., :head_dim]


def num_values(block: torch.Tensor) -> int:
    """head_dim of a block in any dtype."""
    columns = block.shape[-1]
    return columns - _SCALE_BYTES * -(-columns // (GROUP + _SCALE_BYTES)) if block.dtype == torch.int8 else columns


def kept(kv: torch.Tensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A contiguous copy in `dtype`, which is int8 or floats. `kv` is in floats, or in int8 where `dtype` is."""
    return fill(empty_for(kv, dtype, device), kv)


def fill(to: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
    """Copies `kv` into `to`, which `empty_for` made for it; returns `to`."""
    assert kv.dtype != torch.int8 or to.dtype == torch.int8, "a block is never widened to be kept"
    if to.dtype == kv.dtype or to.dtype != torch.int8:
        return to.copy_(kv)
    for some, block in zip(kv.split(_CHUNK, dim=-2), to.split(_CHUNK, dim=-2), strict=True):
        _quantise(some, block)
    return to


def empty_for(kv: torch.Tensor, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Memory for a copy of `kv` in `dtype`."""
    return torch.empty((*kv.shape[:-1], kept_columns(kv, dtype)), dtype=dtype, device=device)


def kept_columns(kv: torch.Tensor, dtype: torch.dtype) -> int:
    """Of a copy of `kv` in `dtype`: levels and scales, or values."""
    return kv_row_bytes(num_values(kv), dtype.itemsize) // dtype.itemsize


def kept_bytes(kv: torch.Tensor, dtype: torch.dtype) -> int:
    """Of what `kept` gives."""
    return kv.numel() // max(1, kv.shape[-1]) * kept_columns(kv, dtype) * dtype.itemsize
