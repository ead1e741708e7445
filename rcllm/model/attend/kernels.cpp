// The CPU kernels as they are called from outside: attention over segments, products with packed matrices, and whole layers.
//
// Knows raw pointers and strides only; `native.py` builds it, checks every argument and is its one caller.
// Vector width is chosen by the compiler's target (AVX-512, AVX2, or 4 lanes), so the library is cached per processor.

#include "attention.h"
#include "layers.h"

extern "C" {

int64_t rcllm_row_tile() { return ROW_TILE; }

// Row r of q starts at q + r * stride, key r at k + r * kv_stride.
void rcllm_attend(const Reads* reads, int64_t layer, const float* q, int64_t stride, const float* k, const float* v,
                  int64_t kv_stride, float* out, float* lse, int64_t num_threads) {
#pragma omp parallel num_threads(num_threads)
  attend({*reads, layer, q, stride, k, v, kv_stride, out, lse});
}

// Copies one layer of segments into rows of `stride` values, keys and behind them values, widened and the keys rotated to
// their positions; segment i goes to the rows from where[i].
void rcllm_gather(const Segment* segments, int64_t num_segments, const int64_t* where, int64_t kv_heads, int64_t dim,
                  int64_t layer, const float* cos, const float* sin, float* out, int64_t stride, int64_t num_threads) {
#pragma omp parallel for collapse(2) num_threads(num_threads)
  for (int64_t i = 0; i < num_segments; i++)
    for (int64_t head = 0; head < kv_heads; head++) {
      const Segment& seg = segments[i];
      float* k = out + where[i] * stride + head * dim;
      const float *c = cos + seg.base * (dim / 2), *s = sin + seg.base * (dim / 2);
      const int64_t step = row_bytes(dim, seg.dtype);
      const Rows keys{seg.rows(layer * 2, kv_heads, head, dim), step, seg.dtype, seg.base ? c : nullptr, s};
      const Rows values{seg.rows(layer * 2 + 1, kv_heads, head, dim), step, seg.dtype, nullptr, nullptr};
      read_rows<Fp32>(keys, seg.len, dim, k, stride);
      read_rows<Fp32>(values, seg.len, dim, k + kv_heads * dim, stride);
    }
}

int64_t rcllm_int8_group() { return INT8_GROUP; }

// residual += delta (where given); out = residual / rms(residual) * weight. All [rows, size].
void rcllm_add_norm(float* residual, const float* delta, const float* weight, float eps, int64_t rows, int64_t size,
                    float* out, int64_t num_threads) {
#pragma omp parallel num_threads(num_threads)
  add_norm(residual, delta, weight, eps, rows, size, out);
}

// out[r, i] = silu(x[r, i]) * x[r, size + i]; x: [rows, 2 size].
void rcllm_swiglu(const float* x, int64_t rows, int64_t size, float* out, int64_t num_threads) {
#pragma omp parallel num_threads(num_threads)
  swiglu(x, rows, size, out);
}

// Rotates heads of queries and keys, which begin each row of `stride` values, to its position; norms: per head, or null.
void rcllm_rotate(float* x, int64_t stride, int64_t rows, const Heads* heads, const int64_t* positions, const float* cos,
                  const float* sin, const float* q_norm, const float* k_norm, float eps, int64_t num_threads) {
#pragma omp parallel num_threads(num_threads)
  rotate(x, stride, rows, *heads, {positions, cos, sin}, q_norm, k_norm, eps);
}

// out[r] = W x[r] + bias; room: [rows, W.room()].
void rcllm_product(const Matrix* w, const float* x, int64_t rows, float* room, float* out, int64_t num_threads) {
#pragma omp parallel num_threads(num_threads)
  product(*w, x, rows, room, out, num_threads);
}

int64_t rcllm_product_room(const Matrix* w, int64_t rows) { return rows * w->room(); }

int64_t rcllm_room(const Layer* layer, int64_t rows) { return Room(*layer, rows, nullptr).num_floats; }

// What precedes the attention of a layer; delta: null before the first.
void rcllm_project(const Layer* layer, const Heads* heads, float eps, const float* cos, const float* sin,
                   const int64_t* positions, float* residual, const float* delta, int64_t rows, float* memory, float* qkv,
                   int64_t num_threads) {
  const Room room(*layer, rows, memory);
#pragma omp parallel num_threads(num_threads)
  project(*layer, residual, delta, rows, {positions, cos, sin}, *heads, eps, room, qkv, num_threads);
}

// What follows it.
void rcllm_feed(const Layer* layer, float eps, float* residual, const float* attended, int64_t rows, float* memory,
                float* delta, int64_t num_threads) {
  const Room room(*layer, rows, memory);
#pragma omp parallel num_threads(num_threads)
  feed(*layer, residual, attended, rows, eps, room, delta, num_threads);
}

// All of it: residual and delta become what the next layer takes. kept: where KV of `num_kept` rows goes, or null.
void rcllm_layer(const Layer* layer, const Heads* heads, float eps, const float* cos, const float* sin,
                 const int64_t* positions, float* residual, float* delta, int64_t is_first, int64_t rows, float* memory,
                 const Reads* reads, int64_t number, const int64_t* kept_rows, int64_t num_kept, float* kept,
                 int64_t num_threads) {
  const Room room(*layer, rows, memory);
  const int64_t stride = layer->qkv.size;
  const float *k = room.qkv + heads->queries * heads->dim, *v = k + heads->keys * heads->dim;
#pragma omp parallel num_threads(num_threads)
  {
    project(*layer, residual, is_first ? nullptr : delta, rows, {positions, cos, sin}, *heads, eps, room, room.qkv, num_threads);
    if (kept) keep(room.qkv, stride, kept_rows, num_kept, *heads, kept);
    attend({*reads, number, room.qkv, stride, k, v, stride, room.attended, nullptr});
    feed(*layer, residual, room.attended, rows, eps, room, delta, num_threads);
  }
}

}  // extern "C"
