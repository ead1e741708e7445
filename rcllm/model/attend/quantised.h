// Products with matrices whose weights are kept in 8 or 4 bits, in groups of inputs that share a scale.
//
// A panel of PANEL outputs is, for each group: PANEL scales in fp16, for 4 bits PANEL least values in fp16, and the levels of
// its inputs, [WEIGHT_GROUP, PANEL] (of 4 bits: two inputs to a byte, the even one in the low half).
// Invariant: a product is that of `products.h` with the widened matrix, bit for bit. So it does not matter to a row whether
// levels are widened on their way into the registers (few rows, which wait for memory) or first into a tile that many rows use.
//
// For rows in levels, those of the matrix lie in cells of 32 bits, a byte for each of 4 inputs, [WEIGHT_GROUP / 4, PANEL].
// Those of 8 bits are raised by 128, into 0 … 255. Those of 4 bits share a cell: inputs 0 … 3 in the low halves of its
// bytes, 4 … 7 in the high ones.

#pragma once

#include "integers.h"

namespace {

constexpr int TILE_GROUPS = 48;   // that are widened at once: such a tile of a panel stays in the L2 cache
constexpr int DIRECT = 3 * MR;    // rows up to which widening anew for each register tile is the quicker way

inline ivec load_cells(const char* levels, int k, int n) {
  return load(reinterpret_cast<const int32_t*>(levels) + k * PANEL + n * VL);
}

// One group of a panel. `value`: VL weights of input k, outputs n · VL and on. Of levels in cells, `cell`: four inputs of
// such outputs; `start` and `add`: where the sum of their products begins, and what it adds to a sum of fp32.
struct Int8Group {  // level · scale
  static constexpr int BYTES = PANEL * (2 + WEIGHT_GROUP);
  vec scale[NR];
  const char* levels;
  explicit Int8Group(const char* at) : levels(at + 2 * PANEL) {
    for (int n = 0; n < NR; n++) scale[n] = load_fp16(at + 2 * n * VL);
  }
  vec value(int k, int n) const { return to_floats(load_int8(levels + k * PANEL + n * VL)) * scale[n]; }
  ivec cell(int k, int n) const { return load_cells(levels, k, n); }
  static ivec start(const InputGroup& x) { return splat(-128 * x.sum); }
  vec add(vec sum, ivec products, const InputGroup& x, int n) const {
    return fused(sum, to_floats(products) * scale[n], splat(x.scale));
  }
};

struct Int4Group {  // level · scale + least
  static constexpr int BYTES = PANEL * (4 + WEIGHT_GROUP / 2);
  vec scale[NR], least[NR];
  const char* levels;
  explicit Int4Group(const char* at) : levels(at + 4 * PANEL) {
    for (int n = 0; n < NR; n++) scale[n] = load_fp16(at + 2 * n * VL), least[n] = load_fp16(at + 2 * (PANEL + n * VL));
  }
  vec value(int k, int n) const {
    const ivec two = load_uint8(levels + k / 2 * PANEL + n * VL);
    return to_floats(k % 2 ? two >> 4 : two & 15) * scale[n] + least[n];
  }
  ivec cell(int k, int n) const { return load_cells(levels, k / 2, n) >> (k % 2 ? 4 : 0) & 0x0f0f0f0f; }
  static ivec start(const InputGroup&) { return ivec{}; }
  vec add(vec sum, ivec products, const InputGroup& x, int n) const {
    return fused(fused(sum, to_floats(products) * scale[n], splat(x.scale)), least[n], splat(x.total));
  }
};

// Inputs k and k + 1 of a group as operands of P.
template <class W>
inline void operands(const W& group, int k, vec (&b)[2][NR]) {
  for (int n = 0; n < NR; n++) b[0][n] = group.value(k, n), b[1][n] = group.value(k + 1, n);
}
template <class W>
inline void operands(const W& group, int k, ivec (&b)[1][NR]) {
  for (int n = 0; n < NR; n++) b[0][n] = pair(group.value(k, n), group.value(k + 1, n));
}

// C[M, PANEL] = A[M, groups · WEIGHT_GROUP] B, widened in registers.
template <class P, class W, int M>
void direct_tile(int64_t groups, const typename P::Cell* A, int64_t sm, const char* B, float* C, int64_t ldc) {
  constexpr int STEPS = 2 / P::VALUES;  // cells of two inputs
  vec acc[M][NR] = {};
  for (int64_t g = 0; g < groups; g++, B += W::BYTES) {
    const W group(B);
    for (int k = 0; k < WEIGHT_GROUP; k += 2, A += STEPS) {
      typename P::Cells b[STEPS][NR];
      operands(group, k, b);
      for (int i = 0; i < STEPS; i++)
        for (int m = 0; m < M; m++) {
          const typename P::Cells a = splat(A[m * sm + i]);
          for (int n = 0; n < NR; n++) acc[m][n] = P::add(acc[m][n], a, b[i][n]);
        }
    }
  }
  for (int m = 0; m < M; m++)
    for (int n = 0; n < NR; n++) store(C + m * ldc + n * VL, acc[m][n]);
}

template <class P, class W>
void direct(int M, int64_t groups, const typename P::Cell* A, int64_t sm, const char* B, float* C, int64_t ldc) {
  switch (M) {
    case 8: return direct_tile<P, W, std::min(8, MR)>(groups, A, sm, B, C, ldc);
    case 7: return direct_tile<P, W, std::min(7, MR)>(groups, A, sm, B, C, ldc);
    case 6: return direct_tile<P, W, std::min(6, MR)>(groups, A, sm, B, C, ldc);
    case 5: return direct_tile<P, W, std::min(5, MR)>(groups, A, sm, B, C, ldc);
    case 4: return direct_tile<P, W, 4>(groups, A, sm, B, C, ldc);
    case 3: return direct_tile<P, W, 3>(groups, A, sm, B, C, ldc);
    case 2: return direct_tile<P, W, 2>(groups, A, sm, B, C, ldc);
    case 1: return direct_tile<P, W, 1>(groups, A, sm, B, C, ldc);
  }
}

// C[M, PANEL] = A[M, cells] B, B a panel.
template <class P, class W>
void quantised_panel(int M, int64_t cells, const typename P::Cell* A, const char* B, float* C, int64_t ldc) {
  constexpr int GROUP_CELLS = WEIGHT_GROUP / P::VALUES, STEPS = 2 / P::VALUES;
  const int64_t groups = cells / GROUP_CELLS;
  const int tiles = (M + MR - 1) / MR;
  auto each_tile = [&](auto product) {
    for (int t = 0; t < tiles; t++) {
      const int m = M * t / tiles, num = M * (t + 1) / tiles - m;
      product(num, A + m * cells, C + m * ldc);
    }
  };
  if (M <= DIRECT)
    return each_tile([&](int num, const typename P::Cell* a, float* c) { direct<P, W>(num, groups, a, cells, B, c, ldc); });
  alignas(64) typename P::Cell wide[TILE_GROUPS * GROUP_CELLS * PANEL];
  for (int64_t g0 = 0; g0 < groups; g0 += TILE_GROUPS) {
    const int num_groups = std::min<int64_t>(TILE_GROUPS, groups - g0);
    typename P::Cell* to = wide;
    for (int g = 0; g < num_groups; g++) {
      const W group(B + (g0 + g) * W::BYTES);
      for (int k = 0; k < WEIGHT_GROUP; k += 2) {
        typename P::Cells b[STEPS][NR];
        operands(group, k, b);
        for (int i = 0; i < STEPS; i++)
          for (int n = 0; n < NR; n++, to += VL) store(to, b[i][n]);
      }
    }
    each_tile([&](int num, const typename P::Cell* a, float* c) {
      rows_tile<P, NR, 0>(num, num_groups * GROUP_CELLS, a + g0 * GROUP_CELLS, cells, 1, wide, PANEL, c, ldc, g0 > 0, nullptr);
    });
  }
}

// C[M, PANEL] = A[M, groups] B, both in levels.
template <class W, int M>
void levels_tile(int64_t groups, const InputGroup* A, int64_t sm, const char* B, float* C, int64_t ldc) {
  vec acc[M][NR] = {};
  for (int64_t g = 0; g < groups; g++, A++, B += W::BYTES) {
    const W group(B);
    ivec sum[M][NR];
    for (int m = 0; m < M; m++)
      for (int n = 0; n < NR; n++) sum[m][n] = W::start(A[m * sm]);
#pragma GCC unroll 8
    for (int k = 0; k < WEIGHT_GROUP / 4; k++) {
      ivec b[NR];
      for (int n = 0; n < NR; n++) b[n] = group.cell(k, n);
      for (int m = 0; m < M; m++) {
        const ivec a = splat(A[m * sm].cells[k]);
        for (int n = 0; n < NR; n++) sum[m][n] = add_levels(sum[m][n], b[n], a);
      }
    }
    for (int m = 0; m < M; m++)
      for (int n = 0; n < NR; n++) acc[m][n] = group.add(acc[m][n], sum[m][n], A[m * sm], n);
  }
  for (int m = 0; m < M; m++)
    for (int n = 0; n < NR; n++) store(C + m * ldc + n * VL, acc[m][n]);
}

constexpr int LEVEL_ROWS = MR / 2;  // of a tile in levels, which has two sums for each output

// Levels of 4 bits are widened anew for each tile, whatever the rows: the quicker way here, where it takes two operations.
template <class W>
void levels_panel(int M, int64_t groups, const InputGroup* A, const char* B, float* C, int64_t ldc) {
  const int tiles = (M + LEVEL_ROWS - 1) / LEVEL_ROWS;
  for (int t = 0; t < tiles; t++) {
    const int m = M * t / tiles, num = M * (t + 1) / tiles - m;
    const InputGroup* a = A + m * groups;
    float* c = C + m * ldc;
    switch (num) {
      case 4: levels_tile<W, std::min(4, LEVEL_ROWS)>(groups, a, groups, B, c, ldc); break;
      case 3: levels_tile<W, std::min(3, LEVEL_ROWS)>(groups, a, groups, B, c, ldc); break;
      case 2: levels_tile<W, 2>(groups, a, groups, B, c, ldc); break;
      case 1: levels_tile<W, 1>(groups, a, groups, B, c, ldc); break;
    }
  }
}

// out[r] = W x[r] + bias. x: [rows, cells], W: in levels of `bits`.
template <class P>
void linear_quantised(const typename P::Cell* x, int64_t rows, int64_t cells, const char* packed, int64_t bits,
                      const float* bias, int64_t size, float* out, int64_t num_threads) {
  auto run = [&](auto product, int64_t group_bytes) {
    const int64_t panel_bytes = cells * P::VALUES / WEIGHT_GROUP * group_bytes;
    each_panel(rows, bias, size, out, num_threads, [&](int64_t first, int num, int64_t panel, float* y, int64_t stride) {
      product(num, cells, x + first * cells, packed + panel * panel_bytes, y, stride);
    });
  };
  if constexpr (std::is_same_v<P, Int8>)
    bits == 8 ? run(levels_panel<Int8Group>, Int8Group::BYTES) : run(levels_panel<Int4Group>, Int4Group::BYTES);
  else
    bits == 8 ? run(quantised_panel<P, Int8Group>, Int8Group::BYTES) : run(quantised_panel<P, Int4Group>, Int4Group::BYTES);
}

}  // namespace

extern "C" {

int64_t rcllm_weight_group() { return WEIGHT_GROUP; }

// Bytes of a packed matrix.
int64_t rcllm_quantised_bytes(int64_t size, int64_t inner, int64_t bits) {
  return (size + PANEL - 1) / PANEL * (inner / WEIGHT_GROUP) * (bits == 8 ? Int8Group::BYTES : Int4Group::BYTES);
}

// Lays levels [size, inner · bits / 8] bytes, scales and (4 bits) least values [size, inner / WEIGHT_GROUP] in fp16 out in
// panels, `together` bytes of an output side by side; zeros fill up the last.
void rcllm_pack_quantised(const uint8_t* levels, const uint16_t* scales, const uint16_t* least, int64_t size, int64_t inner,
                          int64_t bits, int64_t together, char* packed, int64_t num_threads) {
  const int64_t groups = inner / WEIGHT_GROUP, step = WEIGHT_GROUP * bits / 8, heads = bits == 8 ? 1 : 2;
  const int64_t bytes = PANEL * (2 * heads + step);
#pragma omp parallel for num_threads(num_threads)
  for (int64_t panel = 0; panel < (size + PANEL - 1) / PANEL; panel++)
    for (int64_t g = 0; g < groups; g++) {
      char* to = packed + (panel * groups + g) * bytes;
      uint16_t head[2 * PANEL];
      for (int64_t n = 0; n < PANEL; n++) {
        const int64_t row = panel * PANEL + n, at = row * groups + g;
        head[n] = row < size ? scales[at] : 0, head[PANEL + n] = row < size && least ? least[at] : 0;
        char* own = to + 2 * heads * PANEL + n * together;
        for (int64_t k = 0; k < step; k++)
          own[k / together * together * PANEL + k % together] = row < size ? levels[at * step + k] : 0;
      }
      std::memcpy(to, head, 2 * heads * PANEL);
    }
}

}  // extern "C"
