// Products of matrices: the register tile that attention shares, and products with matrices that are packed once.
//
// All is written in cells of 32 bits: one fp32 value, or two neighbours in bf16. A product in bf16 is one of fp32 with half
// as many cells, each of which adds two exact products to an fp32 sum, the second value's first. The processor's instruction
// and its emulation do the same, bit for bit (but for values below 2^-126, which the instruction takes for zeros).
// Invariant: a value is summed in one order, whatever the number of rows.

#pragma once

#include "vectors.h"

namespace {

enum Dtype : int64_t { F32 = 0, F16 = 1, BF16 = 2, I8 = 3 };  // of values in memory

// How a cell of A, for all lanes, and cells of B, a lane each, are multiplied and added to a sum; and how values, in order,
// become cells.
struct Fp32 {
  static constexpr Dtype DTYPE = F32;
  typedef float Cell;
  typedef vec Cells;
  static constexpr int VALUES = 1;  // of a cell
  static Cell cell(const float* x, float scale) { return *x * scale; }
  static void put(Cell* row, int at, vec x) { store(row + at, x); }
  static vec add(vec sum, Cells a, Cells b) { return fused(sum, a, b); }
};

struct Bf16 {
  static constexpr Dtype DTYPE = BF16;
  typedef int32_t Cell;  // the first value in the low half
  typedef ivec Cells;
  static constexpr int VALUES = 2;
  static Cell cell(const float* x, float scale) { return pair(round_bf16(x[0] * scale), round_bf16(x[1] * scale)); }
  static void put(Cell* row, int at, vec x) { store_bf16(row + at / 2, x); }
  static vec add(vec sum, Cells a, Cells b) {
#if defined(__AVX512BF16__)
    return (vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
    return fused(fused(sum, (vec)(a & HIGH), (vec)(b & HIGH)), (vec)(a << 16), (vec)(b << 16));
#endif
  }
};

// ---- one register tile of C[M, N] += A[M, K] B[K, N]; A has free strides, B and C are row-major; K counts cells ----

// Beside, AHEAD cache lines per step of K are fetched to L2, from `ahead` on.
template <class P, int M, int N, int AHEAD>
inline void tile(int K, const typename P::Cell* A, int64_t sm, int64_t sk, const typename P::Cell* B, int ldb, float* C, int ldc,
                 bool add, const typename P::Cell* ahead) {
  vec acc[M][N];
  for (int m = 0; m < M; m++)
    for (int n = 0; n < N; n++) acc[m][n] = add ? load(C + m * ldc + n * VL) : vec{};
  for (int k = 0; k < K; k++) {
    for (int line = 0; line < AHEAD; line++) __builtin_prefetch(ahead + ((int64_t)k * AHEAD + line) * LINE, 0, 2);
    typename P::Cells b[N];
    for (int n = 0; n < N; n++) b[n] = load(B + (int64_t)k * ldb + n * VL);
    for (int m = 0; m < M; m++) {
      const typename P::Cells a = splat(A[m * sm + k * sk]);
      for (int n = 0; n < N; n++) acc[m][n] = P::add(acc[m][n], a, b[n]);
    }
  }
  for (int m = 0; m < M; m++)
    for (int n = 0; n < N; n++) store(C + m * ldc + n * VL, acc[m][n]);
}

constexpr int MR = VL == 16 ? 8 : 4, NR = 3;  // MR · NR accumulators and NR + 1 operands fill the registers

// M: at most MR.
template <class P, int N, int AHEAD>
void rows_tile(int M, int K, const typename P::Cell* A, int64_t sm, int64_t sk, const typename P::Cell* B, int ldb, float* C,
               int ldc, bool add, const typename P::Cell* ahead) {
  switch (M) {
    case 8: return tile<P, std::min(8, MR), N, AHEAD>(K, A, sm, sk, B, ldb, C, ldc, add, ahead);
    case 7: return tile<P, std::min(7, MR), N, AHEAD>(K, A, sm, sk, B, ldb, C, ldc, add, ahead);
    case 6: return tile<P, std::min(6, MR), N, AHEAD>(K, A, sm, sk, B, ldb, C, ldc, add, ahead);
    case 5: return tile<P, std::min(5, MR), N, AHEAD>(K, A, sm, sk, B, ldb, C, ldc, add, ahead);
    case 4: return tile<P, 4, N, AHEAD>(K, A, sm, sk, B, ldb, C, ldc, add, ahead);
    case 3: return tile<P, 3, N, AHEAD>(K, A, sm, sk, B, ldb, C, ldc, add, ahead);
    case 2: return tile<P, 2, N, AHEAD>(K, A, sm, sk, B, ldb, C, ldc, add, ahead);
    case 1: return tile<P, 1, N, AHEAD>(K, A, sm, sk, B, ldb, C, ldc, add, ahead);
  }
}

template <class P, int N>
void column(int M, int K, const typename P::Cell* A, int64_t sm, int64_t sk, const typename P::Cell* B, int ldb, float* C, int ldc,
            bool add) {
  for (int m = 0; m < M; m += MR)
    rows_tile<P, N, 0>(std::min(M - m, MR), K, A + m * sm, sm, sk, B, ldb, C + m * ldc, ldc, add, nullptr);
}

// N is a multiple of VL.
template <class P>
void gemm(int M, int N, int K, const typename P::Cell* A, int64_t sm, int64_t sk, const typename P::Cell* B, int ldb, float* C,
          int ldc, bool add) {
  int n = 0;
  for (; n + NR * VL <= N; n += NR * VL) column<P, NR>(M, K, A, sm, sk, B + n, ldb, C + n, ldc, add);
  if (N - n == 2 * VL) column<P, 2>(M, K, A, sm, sk, B + n, ldb, C + n, ldc, add);
  if (N - n == VL) column<P, 1>(M, K, A, sm, sk, B + n, ldb, C + n, ldc, add);
}

constexpr int PANEL = NR * VL;  // outputs of a matrix that are stored together
constexpr int CHUNK = 192;      // rows whose inputs stay in the L2 cache while panels pass

// C[M, PANEL] = A[M, K] B[K, PANEL], B a panel of a packed matrix. With several tiles of rows, the first would wait for
// memory and the others leave it idle; so each fetches its share of the next panel.
template <class P>
void panel_product(int M, int K, const typename P::Cell* A, const typename P::Cell* B, float* C, int ldc) {
  constexpr int LINES = (PANEL + LINE - 1) / LINE;  // of a panel, per step of K
  const int tiles = (M + MR - 1) / MR, fetching = std::min(tiles, LINES);
  for (int t = 0; t < tiles; t++) {
    const int m = M * t / tiles, num = M * (t + 1) / tiles - m;
    const int from = LINES * t / fetching, lines = tiles == 1 || t >= fetching ? 0 : LINES * (t + 1) / fetching - from;
    const typename P::Cell *a = A + (int64_t)m * K, *ahead = B + (int64_t)K * (PANEL + from * LINE);
    float* c = C + (int64_t)m * ldc;
    if (lines == 2) rows_tile<P, NR, 2>(num, K, a, K, 1, B, PANEL, c, ldc, false, ahead);
    else if (lines == 1) rows_tile<P, NR, 1>(num, K, a, K, 1, B, PANEL, c, ldc, false, ahead);
    else rows_tile<P, NR, 0>(num, K, a, K, 1, B, PANEL, c, ldc, false, nullptr);
  }
}

// Shares the panels of an output [rows, size] and chunks of its rows out among a team, every thread of which calls this.
// product(first row, rows, panel, y, stride): writes y[r * stride + n] for all PANEL outputs; the bias is added here.
template <class Product>
void each_panel(int64_t rows, const float* bias, int64_t size, float* out, int64_t num_threads, const Product& product) {
  const int64_t panels = (size + PANEL - 1) / PANEL;
  int64_t chunks = (rows + CHUNK - 1) / CHUNK;
  while (chunks * panels < 4 * num_threads && rows / (chunks + 1) >= 4 * MR) chunks++;  // work for every thread
#pragma omp for collapse(2)
  for (int64_t c = 0; c < chunks; c++)
    for (int64_t p = 0; p < panels; p++) {
      const int64_t first = rows * c / chunks, num = rows * (c + 1) / chunks - first;
      const int64_t n0 = p * PANEL, width = std::min<int64_t>(PANEL, size - n0);
      float edge[CHUNK * PANEL];  // of a panel that is not full
      const bool full = width == PANEL;
      float *y = out + first * size + n0, *target = full ? y : edge;
      const int64_t stride = full ? size : PANEL;
      product(first, num, p, target, stride);
      if (full && !bias) continue;
      for (int64_t r = 0; r < num; r++)
        for (int64_t n = 0; n < width; n++) y[r * size + n] = target[r * stride + n] + (bias ? bias[n0 + n] : 0.f);
    }
}

// out[r] = W x[r] + bias. x: [rows, cells], packed: W as panels of [cells, PANEL], bias: [size] or null, out: [rows, size].
// With few rows the time is that of reading the matrix once.
template <class P>
void linear(const typename P::Cell* x, int64_t rows, int64_t cells, const typename P::Cell* packed, const float* bias,
            int64_t size, float* out, int64_t num_threads) {
  each_panel(rows, bias, size, out, num_threads, [&](int64_t first, int num, int64_t panel, float* y, int64_t stride) {
    panel_product<P>(num, cells, x + first * cells, packed + panel * PANEL * cells, y, stride);
  });
}

// Cell k of a row of `inner` values, rounded; what is missing is zero.
inline int32_t cell_of(const float* row, int64_t k, int64_t inner) {
  return pair(2 * k < inner ? round_bf16(row[2 * k]) : 0u, 2 * k + 1 < inner ? round_bf16(row[2 * k + 1]) : 0u);
}

// x [rows, inner] as cells [rows, cells]; called by every thread of a team.
inline void round_rows(const float* x, int64_t rows, int64_t inner, int32_t* rounded, int64_t cells) {
#pragma omp for
  for (int64_t r = 0; r < rows; r++) {
    int64_t k = 0;
    for (; 2 * k + VL <= inner; k += VL / 2) store_bf16(rounded + r * cells + k, load(x + r * inner + 2 * k));
    for (; k < cells; k++) rounded[r * cells + k] = cell_of(x + r * inner, k, inner);
  }
}

// x [rows, inner] with zeros behind each row, [rows, size]; called by every thread of a team.
inline void fill_up(const float* x, int64_t rows, int64_t inner, float* filled, int64_t size) {
#pragma omp for
  for (int64_t r = 0; r < rows; r++) std::fill(std::copy_n(x + r * inner, inner, filled + r * size), filled + (r + 1) * size, 0.f);
}

}  // namespace

extern "C" {

int64_t rcllm_panel() { return PANEL; }

// Whether products in bf16 are those of the processor.
int64_t rcllm_has_bf16() {
#if defined(__AVX512BF16__)
  return 1;
#else
  return 0;
#endif
}

// Lays a matrix of cells [size, inner] out in panels of PANEL outputs, each [inner, PANEL]; zeros fill up the last.
void rcllm_pack(const float* weight, int64_t size, int64_t inner, float* packed, int64_t num_threads) {
#pragma omp parallel for num_threads(num_threads)
  for (int64_t n0 = 0; n0 < size; n0 += PANEL)
    for (int64_t k = 0; k < inner; k++)
      for (int64_t n = 0; n < PANEL; n++)
        packed[n0 * inner + k * PANEL + n] = n0 + n < size ? weight[(n0 + n) * inner + k] : 0.f;
}

}  // extern "C"
