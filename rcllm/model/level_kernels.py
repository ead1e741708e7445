"""The GPU kernels of products with matrices in levels, in Triton: what `level_products.py` launches.

    product_kernel: few rows, of whose time reading the levels is most; widened in registers, tile by tile
    widen_kernel:   a whole matrix for many rows, which torch multiplies with

Knows nothing of when they are used. Invariant: both multiply with the same numbers, those of `Quantised.widen` rounded
to the dtype of the rows: a level is exact in fp32, so is its product with a scale, and the sum with the least value is
rounded once. Sums are in fp32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rcllm.model.attend.triton_kernels import product

# An fp32 of 2^23 holds an integer in its low bits: put there and taken off again, levels become floats without the unit
# that converts, which does 16 values a clock and would be the slowest part of all.


@triton.jit
def _widened(
    levels,  # of 8 bits: int16 [out, pitch], two levels each; of 4 bits: uint8 [out, pitch], two levels each
    scales,  # fp16 [out, groups]
    least,
    out,  # rows of the matrix
    start,  # input
    pitch,
    groups,
    BITS: tl.constexpr,
    INPUTS: tl.constexpr,
    GROUP: tl.constexpr,
    ALIGNED: tl.constexpr,  # a power of two that divides the groups
    DTYPE: tl.constexpr,
):
    """[out, INPUTS] of the matrix, from input `start` on. Levels of groups that there are not are some number."""
    pairs = start // 2 + tl.arange(0, INPUTS // 2)
    members = start // GROUP + tl.arange(0, INPUTS // GROUP)
    words = tl.load(levels + out[:, None] * pitch + pairs[None, :], mask=(pairs < pitch)[None, :], other=0)
    at, there = out[:, None] * tl.multiple_of(groups, ALIGNED) + members[None, :], (members < groups)[None, :]
    scale = tl.load(scales + at, mask=there, other=0.0).to(tl.float32)[:, :, None]
    grouped: tl.constexpr = [out.shape[0], INPUTS // GROUP, GROUP // 2]
    bits = words.to(tl.int32)
    if BITS == 8:  # half of the levels are converted by that unit, half are not, so that none waits for the other
        low = words.to(tl.int8).to(tl.float32)
        high = ((bits & 0xFF00) ^ 0x4B008000).to(tl.float32, bitcast=True) - (2**23 + 2**15)  # level · 256
        low = tl.reshape(low, grouped) * scale
        high = tl.reshape(high, grouped) * (scale / 256)
    else:
        low = ((bits & 15) | 0x4B000000).to(tl.float32, bitcast=True)
        high = (bits | 0x4B000000).to(tl.float32, bitcast=True) - low  # level · 16
        offset = tl.load(least + at, mask=there, other=0.0).to(tl.float32)[:, :, None]
        low = tl.reshape(low - 2**23, grouped) * scale + offset
        high = tl.reshape(high, grouped) * (scale / 16) + offset
    return tl.reshape(tl.join(low.to(DTYPE), high.to(DTYPE)), [out.shape[0], INPUTS])


@triton.jit(do_not_specialize=["num_rows", "steps"])
def product_kernel(
    x,  # [rows, in]
    levels,
    scales,
    least,
    bias,  # [out]
    output,  # [rows, out]; or fp32 [splits, rows, out], whose sum it is
    num_rows,
    size,  # out
    inner,  # in
    pitch,
    groups,
    x_pitch,
    steps,  # over inputs, of one split
    BITS: tl.constexpr,
    BIAS: tl.constexpr,  # whether to add it
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr,
    GROUP: tl.constexpr,
    ALIGNED: tl.constexpr,
    EMULATE: tl.constexpr,
):
    """x Wᵀ + bias, computed as W xᵀ: the widened tile stays in registers. Grid: (row tiles, tiles of out, splits).

    Rows and outputs beyond the last are the last once more, and are not stored.
    """
    row, out = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    split = tl.program_id(2)
    near_row, near_out = tl.minimum(row, num_rows - 1).to(tl.int64), tl.minimum(out, size - 1).to(tl.int64)
    columns = tl.arange(0, INPUTS)
    total = tl.zeros([OUTPUTS, ROWS], tl.float32)
    for step in range(split * steps, tl.minimum((split + 1) * steps, tl.cdiv(inner, INPUTS))):
        start = step * INPUTS
        there = (start + columns < inner)[:, None]
        inputs = tl.load(x + near_row[None, :] * x_pitch + (start + columns)[:, None], mask=there, other=0.0)
        matrix = (levels, scales, least, near_out, start, pitch, groups)
        values = _widened(*matrix, BITS, INPUTS, GROUP, ALIGNED, x.dtype.element_ty)
        total = product(values, inputs, total, EMULATE)
    if BIAS:
        total += tl.load(bias + near_out).to(tl.float32)[:, None]
    at = output + (split * num_rows + row)[:, None].to(tl.int64) * size + out[None, :]
    here = (row < num_rows)[:, None] & (out < size)[None, :]
    tl.store(at, tl.trans(total).to(output.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=["num_splits", "num_rows"])
def sum_kernel(parts, bias, output, num_splits, num_rows, size, BIAS: tl.constexpr, COLUMNS: tl.constexpr):
    """The splits of one row in their order, and its bias. Grid: (rows, out / COLUMNS)."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    here = columns < size
    total = tl.zeros([COLUMNS], tl.float32)
    for split in range(0, num_splits):
        total += tl.load(parts + (split * num_rows + row) * size + columns, mask=here, other=0.0)
    if BIAS:
        total += tl.load(bias + columns, mask=here, other=0.0).to(tl.float32)
    tl.store(output + row * size + columns, total.to(output.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=["num_rows"])
def widen_kernel(
    levels,
    scales,
    least,
    output,  # [rows of the matrix, in]
    num_rows,
    inner,
    pitch,
    groups,
    BITS: tl.constexpr,
    ROWS: tl.constexpr,
    INPUTS: tl.constexpr,
    GROUP: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Grid: (row tiles, tiles of inputs)."""
    row, start = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1) * INPUTS
    near = tl.minimum(row, num_rows - 1).to(tl.int64)
    matrix = (levels, scales, least, near, start, pitch, groups)
    values = _widened(*matrix, BITS, INPUTS, GROUP, ALIGNED, output.dtype.element_ty)
    columns = start + tl.arange(0, INPUTS)
    here = (row < num_rows)[:, None] & (columns < inner)[None, :]
    tl.store(output + row[:, None].to(tl.int64) * inner + columns[None, :], values, mask=here)
