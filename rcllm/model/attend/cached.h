// Reading K and V: rows of a block in any dtype, or of fresh rows, as operands of the products of attention.

#pragma once

#include "products.h"

namespace {

constexpr int INT8_GROUP = 16;  // levels that share a scale; a row of I8 is its levels and behind them the scales in bf16
static_assert(INT8_GROUP % VL == 0, "a vector has one scale");

inline int64_t row_bytes(int64_t dim, int64_t dtype) {
  if (dtype == I8) return dim + dim / INT8_GROUP * 2;
  return dim * (dtype == F32 ? 4 : 2);
}

inline float from_bf16(const char* p) {
  uint16_t high;
  std::memcpy(&high, p, 2);
  const uint32_t bits = (uint32_t)high << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// Values d … d + VL - 1 of a row; d is a multiple of VL.
inline vec widen(const char* row, int d, int dim, int64_t dtype) {
  if (dtype == F32) return load(reinterpret_cast<const float*>(row) + d);
  if (dtype == I8) return to_floats(load_int8(row + d)) * splat(from_bf16(row + dim + d / INT8_GROUP * 2));
  if (dtype == F16) return load_fp16(row + 2 * d);
  return (vec)(load_uint16(row + 2 * d) << 16);
}

constexpr int AHEAD_ROWS = 8;  // read early: rows of the fused projection lie too far apart for the processor to foresee

inline void fetch_row(const char* row, int dim, int64_t dtype) {
  for (int64_t at = 0; at < row_bytes(dim, dtype); at += LINE * 4) __builtin_prefetch(row + at);
}

// Rows of `dim` values, `step` bytes apart: widened, for keys rotated by the angle whose cos and sin are given ([dim / 2], or
// null), and written as cells.
template <class P>
void read_rows(const char* src, int64_t step, int64_t dtype, int rows, int dim, const float* cos, const float* sin,
               typename P::Cell* dst, int64_t stride) {
  const int half = dim / 2;
  for (int r = 0; r < rows; r++, dst += stride, src += step) {
    fetch_row(src + AHEAD_ROWS * step, dim, dtype);
    if (!cos) {
      for (int d = 0; d < dim; d += VL) P::put(dst, d, widen(src, d, dim, dtype));
    } else {
      for (int d = 0; d < half; d += VL) {
        vec a = widen(src, d, dim, dtype), b = widen(src, d + half, dim, dtype), c = load(cos + d), s = load(sin + d);
        P::put(dst, d, a * c - b * s);
        P::put(dst, d + half, b * c + a * s);
      }
    }
  }
}

template <class P>
struct Operand {  // cells; element (i, j) at data[i * rows + j * columns]
  const typename P::Cell* data;
  int64_t rows, columns;
};

// Keys of [keys, dim] as the left operand of K Q^T, in `room` unless they can be read where they lie.
template <class P>
Operand<P> keys_of(const char* src, int64_t step, int64_t dtype, int keys, int dim, const float* cos, const float* sin,
                   typename P::Cell* room) {
  if (dtype == P::DTYPE && !cos) return {reinterpret_cast<const typename P::Cell*>(src), step / 4, 1};
  read_rows<P>(src, step, dtype, keys, dim, cos, sin, room, dim / P::VALUES);
  return {room, dim / P::VALUES, 1};
}

// Values of [keys, dim] as the left operand of V^T P^T. A cell of bf16 holds one value of two keys: the earlier key's in the
// high half, which is added first, so that keys are added in their order however they fall into pairs.
inline Operand<Fp32> values_of(const char* src, int64_t step, int64_t dtype, int keys, int dim, float* room) {
  const Operand<Fp32> rows = keys_of<Fp32>(src, step, dtype, keys, dim, nullptr, nullptr, room);
  return {rows.data, 1, rows.rows};
}
inline Operand<Bf16> values_of(const char* src, int64_t step, int64_t dtype, int keys, int dim, int32_t* room) {
  for (int j = 0; j < keys; j += 2, src += 2 * step) {
    for (int row = 0; row < 2; row++) fetch_row(src + (AHEAD_ROWS + row) * step, dim, dtype);
    for (int d = 0; d < dim; d += VL) {
      const vec first = widen(src, d, dim, dtype), second = j + 1 < keys ? widen(src + step, d, dim, dtype) : vec{};
      store(room + j / 2 * dim + d, pair(round_bf16(second), round_bf16(first)));
    }
  }
  return {room, 1, dim};
}

}  // namespace
