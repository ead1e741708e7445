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
  return as_float((uint32_t)high << 16);
}

// Values d … d + VL - 1 of a row, widened; d is a multiple of VL.
template <Dtype>
struct Values;
template <>
struct Values<F32> {
  static vec at(const char* row, int d, int) { return load(reinterpret_cast<const float*>(row) + d); }
};
template <>
struct Values<F16> {
  static vec at(const char* row, int d, int) { return load_fp16(row + 2 * d); }
};
template <>
struct Values<BF16> {
  static vec at(const char* row, int d, int) { return (vec)(load_uint16(row + 2 * d) << 16); }
};
template <>
struct Values<I8> {
  static vec at(const char* row, int d, int dim) {
    return to_floats(load_int8(row + d)) * splat(from_bf16(row + dim + d / INT8_GROUP * 2));
  }
};

// Calls f with the Values of a dtype.
template <class F>
inline void with_values(int64_t dtype, const F& f) {
  switch (dtype) {
    case F32: return f(Values<F32>{});
    case F16: return f(Values<F16>{});
    case BF16: return f(Values<BF16>{});
    case I8: return f(Values<I8>{});
  }
}

// Values of two rows as cells of bf16, the first row's in the low half.
template <class V>
inline ivec paired(V, const char* first, const char* second, int d, int dim) {
  return pair(V::at(first, d, dim), V::at(second, d, dim));
}
inline ivec paired(Values<BF16>, const char* first, const char* second, int d, int) {
  return load_uint16(first + 2 * d) | load_uint16(second + 2 * d) << 16;
}

constexpr int AHEAD_ROWS = 8;  // read early: rows of the fused projection lie too far apart for the processor to foresee

inline void fetch_row(const char* row, int dim, int64_t dtype) {
  for (int64_t at = 0; at < row_bytes(dim, dtype); at += LINE * 4) __builtin_prefetch(row + at);
}

struct Rows {  // of `dim` values, `step` bytes apart
  const char* data;
  int64_t step, dtype;
  const float *cos, *sin;  // [dim / 2], of the angle by which keys are to be rotated, or null

  Rows from(int64_t row) const { return {data + row * step, step, dtype, cos, sin}; }
};

// Rows widened, rotated, and written as cells.
template <class P>
void read_rows(const Rows& from, int rows, int dim, typename P::Cell* dst, int64_t stride) {
  const int half = dim / 2;
  with_values(from.dtype, [&](auto values) {
    const char* src = from.data;
    for (int r = 0; r < rows; r++, dst += stride, src += from.step) {
      fetch_row(src + AHEAD_ROWS * from.step, dim, from.dtype);
      if (!from.cos) {
        for (int d = 0; d < dim; d += VL) P::put(dst, d, values.at(src, d, dim));
      } else {
        for (int d = 0; d < half; d += VL) {
          const vec a = values.at(src, d, dim), b = values.at(src, d + half, dim);
          const vec c = load(from.cos + d), s = load(from.sin + d);
          P::put(dst, d, a * c - b * s);
          P::put(dst, d + half, b * c + a * s);
        }
      }
    }
  });
}

template <class P>
struct Operand {  // cells of keys, or of values: that of key i, dimension j lies at data[i * step + j]
  const typename P::Cell* data;
  int64_t step;
};

// In `room` unless they can be read where they lie.
template <class P>
Operand<P> keys_of(const Rows& from, int keys, int dim, typename P::Cell* room) {
  if (from.dtype == P::DTYPE && !from.cos) return {reinterpret_cast<const typename P::Cell*>(from.data), from.step / 4};
  read_rows<P>(from, keys, dim, room, dim / P::VALUES);
  return {room, dim / P::VALUES};
}

// A cell of bf16 holds one value of two keys: the earlier key's in the high half, which is added first, so that keys are
// added in their order however they fall into pairs.
inline Operand<Fp32> values_of(const Rows& from, int keys, int dim, float* room) { return keys_of<Fp32>(from, keys, dim, room); }
inline Operand<Bf16> values_of(const Rows& from, int keys, int dim, int32_t* room) {
  with_values(from.dtype, [&](auto values) {
    const char* src = from.data;
    for (int j = 0; j < keys; j += 2, src += 2 * from.step) {
      for (int row = 0; row < 2; row++) fetch_row(src + (AHEAD_ROWS + row) * from.step, dim, from.dtype);
      int32_t* to = room + j / 2 * dim;
      if (j + 1 < keys) {
        for (int d = 0; d < dim; d += VL) store(to + d, paired(values, src + from.step, src, d, dim));
      } else {
        for (int d = 0; d < dim; d += VL) store(to + d, pair(vec{}, values.at(src, d, dim)));
      }
    }
  });
  return {room, dim};
}

}  // namespace
