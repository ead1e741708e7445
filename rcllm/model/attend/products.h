// Products of matrices: the register tile that attention shares, and products with matrices that are packed once.
//
// A value is summed in one order, whatever the number of rows.

#pragma once

#include "vectors.h"

namespace {

// ---- one register tile of C[M, N] += A[M, K] B[K, N]; A has free strides, B and C are row-major ----

// Beside, AHEAD cache lines per step of K are fetched to L2, from `ahead` on.
template <int M, int N, int AHEAD>
inline void tile(int K, const float* A, int64_t sm, int64_t sk, const float* B, int ldb, float* C, int ldc, bool add,
                 const float* ahead) {
  vec acc[M][N];
  for (int m = 0; m < M; m++)
    for (int n = 0; n < N; n++) acc[m][n] = add ? load(C + m * ldc + n * VL) : vec{};
  for (int k = 0; k < K; k++) {
    for (int line = 0; line < AHEAD; line++) __builtin_prefetch(ahead + ((int64_t)k * AHEAD + line) * LINE, 0, 2);
    vec b[N];
    for (int n = 0; n < N; n++) b[n] = load(B + (int64_t)k * ldb + n * VL);
    for (int m = 0; m < M; m++) {
      vec a = splat(A[m * sm + k * sk]);
      for (int n = 0; n < N; n++) acc[m][n] += a * b[n];
    }
  }
  for (int m = 0; m < M; m++)
    for (int n = 0; n < N; n++) store(C + m * ldc + n * VL, acc[m][n]);
}

constexpr int MR = VL == 16 ? 8 : 4, NR = 3;  // MR · NR accumulators and NR + 1 operands fill the registers

// M: at most MR.
template <int N, int AHEAD>
void rows_tile(int M, int K, const float* A, int64_t sm, int64_t sk, const float* B, int ldb, float* C, int ldc, bool add,
               const float* ahead) {
  switch (M) {
    case 8: return tile<std::min(8, MR), N, AHEAD>(K, A, sm, sk, B, ldb, C, ldc, add, ahead);
    case 7: return tile<std::min(7, MR), N, AHEAD>(K, A, sm, sk, B, ldb, C, ldc, add, ahead);
    case 6: return tile<std::min(6, MR), N, AHEAD>(K, A, sm, sk, B, ldb, C, ldc, add, ahead);
    case 5: return tile<std::min(5, MR), N, AHEAD>(K, A, sm, sk, B, ldb, C, ldc, add, ahead);
    case 4: return tile<4, N, AHEAD>(K, A, sm, sk, B, ldb, C, ldc, add, ahead);
    case 3: return tile<3, N, AHEAD>(K, A, sm, sk, B, ldb, C, ldc, add, ahead);
    case 2: return tile<2, N, AHEAD>(K, A, sm, sk, B, ldb, C, ldc, add, ahead);
    case 1: return tile<1, N, AHEAD>(K, A, sm, sk, B, ldb, C, ldc, add, ahead);
  }
}

template <int N>
void column(int M, int K, const float* A, int64_t sm, int64_t sk, const float* B, int ldb, float* C, int ldc, bool add) {
  for (int m = 0; m < M; m += MR)
    rows_tile<N, 0>(std::min(M - m, MR), K, A + m * sm, sm, sk, B, ldb, C + m * ldc, ldc, add, nullptr);
}

// N is a multiple of VL.
void gemm(int M, int N, int K, const float* A, int64_t sm, int64_t sk, const float* B, int ldb, float* C, int ldc, bool add) {
  int n = 0;
  for (; n + NR * VL <= N; n += NR * VL) column<NR>(M, K, A, sm, sk, B + n, ldb, C + n, ldc, add);
  if (N - n == 2 * VL) column<2>(M, K, A, sm, sk, B + n, ldb, C + n, ldc, add);
  if (N - n == VL) column<1>(M, K, A, sm, sk, B + n, ldb, C + n, ldc, add);
}

constexpr int PANEL = NR * VL;  // outputs of a matrix that are stored together
constexpr int CHUNK = 192;      // rows whose inputs stay in the L2 cache while panels pass

// C[M, PANEL] = A[M, K] B[K, PANEL], B a panel of a packed matrix. With several tiles of rows, the first would wait for
// memory and the others leave it idle; so each fetches its share of the next panel.
void panel_product(int M, int K, const float* A, const float* B, float* C, int ldc) {
  constexpr int LINES = (PANEL + LINE - 1) / LINE;  // of a panel, per step of K
  const int tiles = (M + MR - 1) / MR, fetching = std::min(tiles, LINES);
  for (int t = 0; t < tiles; t++) {
    const int m = M * t / tiles, num = M * (t + 1) / tiles - m;
    const int from = LINES * t / fetching, lines = tiles == 1 || t >= fetching ? 0 : LINES * (t + 1) / fetching - from;
    const float *a = A + (int64_t)m * K, *ahead = B + (int64_t)K * (PANEL + from * LINE);
    float* c = C + (int64_t)m * ldc;
    if (lines == 2) rows_tile<NR, 2>(num, K, a, K, 1, B, PANEL, c, ldc, false, ahead);
    else if (lines == 1) rows_tile<NR, 1>(num, K, a, K, 1, B, PANEL, c, ldc, false, ahead);
    else rows_tile<NR, 0>(num, K, a, K, 1, B, PANEL, c, ldc, false, nullptr);
  }
}

}  // namespace

extern "C" {

int64_t rcllm_panel() { return PANEL; }

// Lays a matrix [size, inner] out in panels of PANEL outputs, each [inner, PANEL]; zeros fill up the last.
void rcllm_pack(const float* weight, int64_t size, int64_t inner, float* packed, int64_t num_threads) {
#pragma omp parallel for num_threads(num_threads)
  for (int64_t n0 = 0; n0 < size; n0 += PANEL)
    for (int64_t k = 0; k < inner; k++)
      for (int64_t n = 0; n < PANEL; n++)
        packed[n0 * inner + k * PANEL + n] = n0 + n < size ? weight[(n0 + n) * inner + k] : 0.f;
}

// out[r] = W x[r] + bias. x: [rows, inner], packed: of `rcllm_pack`, bias: [size] or null, out: [rows, size].
// A value is summed in one order, whatever the number of rows. With few rows the time is that of reading the matrix once.
void rcllm_linear(const float* x, int64_t rows, int64_t inner, const float* packed, const float* bias, int64_t size,
                  float* out, int64_t num_threads) {
  const int64_t panels = (size + PANEL - 1) / PANEL;
  int64_t chunks = (rows + CHUNK - 1) / CHUNK;
  while (chunks * panels < 4 * num_threads && rows / (chunks + 1) >= 4 * MR) chunks++;  // work for every thread
#pragma omp parallel for collapse(2) num_threads(num_threads)
  for (int64_t c = 0; c < chunks; c++)
    for (int64_t p = 0; p < panels; p++) {
      const int64_t first = rows * c / chunks, num = rows * (c + 1) / chunks - first;
      const int64_t n0 = p * PANEL, width = std::min<int64_t>(PANEL, size - n0);
      float edge[CHUNK * PANEL];  // of a panel that is not full
      const bool full = width == PANEL;
      float *y = out + first * size + n0, *target = full ? y : edge;
      const int64_t stride = full ? size : PANEL;
      panel_product(num, inner, x + first * inner, packed + n0 * inner, target, stride);
      if (full && !bias) continue;
      for (int64_t r = 0; r < num; r++)
        for (int64_t n = 0; n < width; n++) y[r * size + n] = target[r * stride + n] + (bias ? bias[n0 + n] : 0.f);
    }
}

}  // extern "C"
