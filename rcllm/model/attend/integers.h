// Rows that are rounded to levels of 8 bits, and sums of their products with the levels of a matrix.
//
// WEIGHT_GROUP inputs share a scale: value = level · scale, level in -127 … 127, to the nearest, ties to even.
// Invariant: sums inside a group are whole numbers, so that the processor's instruction and plain code give the same bits.

#pragma once

#include "products.h"

namespace {

constexpr int WEIGHT_GROUP = 32;  // inputs that share a scale, of matrices and of rows

// A group of a row. An input that is not finite makes its scale NaN, and thereby every output of the row.
struct InputGroup {
  int32_t cells[WEIGHT_GROUP / 4];  // of four levels each
  int32_t sum;                      // of the levels
  float scale, total;               // total = sum · scale
};

// What linear_quantised multiplies: a whole group is its cell.
struct Int8 {
  typedef InputGroup Cell;
  static constexpr int VALUES = WEIGHT_GROUP;
};

// sum + the products of four levels of a matrix, in 0 … 255, and four of a row.
inline ivec add_levels(ivec sum, ivec matrix, ivec row) {
#if defined(__AVX512VNNI__)
  return (ivec)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)matrix, (__m512i)row);
#elif defined(__AVXVNNI__) && !defined(__AVX512F__)
  return (ivec)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)matrix, (__m256i)row);
#else
  for (int bit = 0; bit < 32; bit += 8) sum += (matrix >> bit & 255) * (row << (24 - bit) >> 24);
  return sum;
#endif
}

// Of WEIGHT_GROUP inputs. Where 127 / largest overflows they are taken for zeros; torch's twin divides and rounds alike.
inline InputGroup round_group(const float* x) {
  constexpr int PARTS = WEIGHT_GROUP / VL;
  ivec sizes{}, sums{};
  for (int i = 0; i < PARTS; i++) {
    const ivec size = (ivec)load(x + i * VL) & 0x7fffffff;  // bits of sizes order as sizes do, with NaN last
    sizes = size > sizes ? size : sizes;
  }
  const float largest = as_float(fold(sizes, [](ivec a, ivec b) { return a > b ? a : b; })), inverse = 127.f / largest;
  InputGroup group = {};
  if (!(largest <= FLT_MAX)) group.scale = group.total = NAN;
  else if (inverse <= FLT_MAX) {
    for (int i = 0; i < PARTS; i++) {
      const ivec levels = nearest(load(x + i * VL) * splat(inverse));
      store_int8(reinterpret_cast<char*>(group.cells) + i * VL, levels);
      sums += levels;
    }
    group.sum = fold(sums, [](ivec a, ivec b) { return a + b; });
    group.scale = largest / 127.f, group.total = group.sum * group.scale;
  }
  return group;
}

// x [rows, inner] as groups [rows, groups]; called by every thread of a team.
inline void round_rows(const float* x, int64_t rows, int64_t inner, InputGroup* rounded, int64_t groups) {
#pragma omp for
  for (int64_t r = 0; r < rows; r++) {
    const float* row = x + r * inner;
    for (int64_t g = 0; g < groups; g++, row += WEIGHT_GROUP) {
      float last[WEIGHT_GROUP] = {};  // with zeros behind its inputs
      const int64_t left = inner - g * WEIGHT_GROUP;
      if (left < WEIGHT_GROUP) std::copy_n(row, left, last);
      rounded[r * groups + g] = round_group(left < WEIGHT_GROUP ? last : row);
    }
  }
}

}  // namespace

extern "C" {

// Whether products of levels are those of the processor.
int64_t rcllm_has_vnni() {
#if defined(__AVX512VNNI__) || (defined(__AVXVNNI__) && !defined(__AVX512F__))
  return 1;
#else
  return 0;
#endif
}

}  // extern "C"
