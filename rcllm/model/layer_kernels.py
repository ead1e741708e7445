"""The GPU kernels of a layer's steps other than attention and products, in Triton: what `TritonOps` launches.

Knows nothing of models. Invariant: each rounds where `TorchOps` does, so that both give the same numbers but for the
order of sums.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def add_norm_kernel(residual, delta, weight, output, size, eps, ADDS: tl.constexpr, SIZE_PADDED: tl.constexpr):
    """residual += delta; output = RMSNorm(residual) · weight. Grid: (rows,)."""
    columns = tl.arange(0, SIZE_PADDED)
    here = columns < size
    at = tl.program_id(0).to(tl.int64) * size + columns
    values = tl.load(residual + at, mask=here, other=0.0)
    if ADDS:
        values = (values.to(tl.float32) + tl.load(delta + at, mask=here, other=0.0).to(tl.float32)).to(values.dtype)
        tl.store(residual + at, values, mask=here)
    wide = values.to(tl.float32)
    normed = (wide * tl.rsqrt(tl.sum(wide * wide) / size + eps)).to(values.dtype).to(tl.float32)
    scaled = normed * tl.load(weight + columns, mask=here, other=0.0).to(tl.float32)
    tl.store(output + at, scaled.to(values.dtype), mask=here)


@triton.jit
def _normed(low, high, weight, columns, here, half, eps, DTYPE: tl.constexpr):
    """RMSNorm over heads [heads, 2 · half], given as halves; `weight` [heads, 1] points to the head's weights."""
    square = tl.sum(low * low, 1) + tl.sum(high * high, 1)
    factor = tl.rsqrt(square / (2 * half) + eps)[:, None]
    low, high = (low * factor).to(DTYPE).to(tl.float32), (high * factor).to(DTYPE).to(tl.float32)
    low = (low * tl.load(weight + columns, mask=here, other=0.0).to(tl.float32)).to(DTYPE).to(tl.float32)
    high = (high * tl.load(weight + columns + half, mask=here, other=0.0).to(tl.float32)).to(DTYPE).to(tl.float32)
    return low, high


@triton.jit
def rotate_kernel(
    qkv,
    positions,
    cos,
    sin,
    q_norm,
    k_norm,
    pitch,
    eps,
    NORMS: tl.constexpr,
    H: tl.constexpr,
    HEADS: tl.constexpr,  # H and KV
    HEADS_PADDED: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PADDED: tl.constexpr,
):
    """Norms and turns the heads of q and k of one row, in place. Grid: (rows,)."""
    row = tl.program_id(0).to(tl.int64)
    heads, columns = tl.arange(0, HEADS_PADDED)[:, None], tl.arange(0, HALF_PADDED)[None, :]
    here = (heads < HEADS) & (columns < HALF)
    at = qkv + row * pitch + heads * (2 * HALF) + columns
    stored = tl.load(at, mask=here, other=0.0)
    low, high = stored.to(tl.float32), tl.load(at + HALF, mask=here, other=0.0).to(tl.float32)
    if NORMS:
        weight = tl.where(heads < H, q_norm, k_norm)
        low, high = _normed(low, high, weight, columns, here, HALF, eps, qkv.dtype.element_ty)
    angle = tl.load(positions + row) * HALF + columns
    c, s = tl.load(cos + angle, mask=columns < HALF, other=0.0), tl.load(sin + angle, mask=columns < HALF, other=0.0)
    tl.store(at, (low * c - high * s).to(qkv.dtype.element_ty), mask=here)
    tl.store(at + HALF, (high * c + low * s).to(qkv.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=["num_kept"])
def keep_kernel(
    qkv,
    rows,
    back,
    cos,
    sin,
    to,
    pitch,
    num_kept,
    H: tl.constexpr,
    KV: tl.constexpr,
    KV_PADDED: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PADDED: tl.constexpr,
    SHIFTS: tl.constexpr,
):
    """Keys of some rows, turned back by `back` positions, and their values, to [2, KV, kept, D]. Grid: (kept,)."""
    number = tl.program_id(0)
    heads, columns = tl.arange(0, KV_PADDED)[:, None], tl.arange(0, HALF_PADDED)[None, :]
    here = (heads < KV) & (columns < HALF)
    at = qkv + tl.load(rows + number) * pitch + (H + heads) * (2 * HALF) + columns
    out = to + (heads.to(tl.int64) * num_kept + number) * (2 * HALF) + columns
    low, high = tl.load(at, mask=here, other=0.0), tl.load(at + HALF, mask=here, other=0.0)
    if SHIFTS:
        angle = tl.load(back + number) * HALF + columns
        c, s = tl.load(cos + angle, mask=columns < HALF), tl.load(sin + angle, mask=columns < HALF)
        wide_low, wide_high = low.to(tl.float32), high.to(tl.float32)
        low = (wide_low * c + wide_high * s).to(to.dtype.element_ty)
        high = (wide_high * c - wide_low * s).to(to.dtype.element_ty)
    tl.store(out, low, mask=here)
    tl.store(out + HALF, high, mask=here)
    values, beside = at + KV * (2 * HALF), out + KV * num_kept.to(tl.int64) * (2 * HALF)
    tl.store(beside, tl.load(values, mask=here, other=0.0), mask=here)
    tl.store(beside + HALF, tl.load(values + HALF, mask=here, other=0.0), mask=here)


@triton.jit
def swiglu_kernel(gate_up, output, size, COLUMNS: tl.constexpr):
    """silu(gate) · up; grid: (rows, columns / COLUMNS)."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    here = columns < size
    gate = tl.load(gate_up + row * 2 * size + columns, mask=here, other=0.0)
    up = tl.load(gate_up + row * 2 * size + size + columns, mask=here, other=0.0)
    wide = gate.to(tl.float32)
    small = tl.exp(-tl.abs(wide))  # which never overflows
    silu = (wide * tl.where(wide < 0.0, small, 1.0) / (1.0 + small)).to(gate.dtype)
    tl.store(output + row * size + columns, (silu.to(tl.float32) * up.to(tl.float32)).to(gate.dtype), mask=here)
