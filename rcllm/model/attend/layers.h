// The steps of a layer, each called by every thread of a team, so that one call from outside runs a whole layer.

#pragma once

#include <utility>

#include "attention.h"
#include "quantised.h"

namespace {

// A packed matrix W [size, inner], as Python describes it.
struct Matrix {
  int64_t bits;    // of a weight: 32, 16 (bf16), or 8 or 4 (levels)
  int64_t inputs;  // bits of an input as it is multiplied: 32, 16 (bf16) or 8 (levels, of a matrix in levels)
  const char* packed;
  const float* bias;  // [size], or null
  int64_t size, inner;
  int64_t given;  // inputs; the others, up to inner, are zeros

  int64_t cells() const { return (inner + 1) / 2; }        // of a row in bf16
  int64_t groups() const { return inner / WEIGHT_GROUP; }  // of a row in levels
  int64_t room() const {                                   // values of 32 bits that a row needs
    if (inputs == 8) return groups() * sizeof(InputGroup) / 4;
    return inputs == 16 ? cells() : given < inner ? inner : 0;
  }
};

struct Layer {
  const float *input_norm, *post_norm, *q_norm, *k_norm;  // weights; the last two, of a norm per head (Qwen3), or null
  Matrix qkv, o, gate_up, down;
};

// out[r] = W x[r] + bias; room: [rows, W.room()].
inline void product(const Matrix& w, const float* x, int64_t rows, float* room, float* out, int64_t num_threads) {
  auto* rounded = reinterpret_cast<int32_t*>(room);
  auto* grouped = reinterpret_cast<InputGroup*>(room);
  if (w.inputs == 8) round_rows(x, rows, w.given, grouped, w.groups());
  else if (w.inputs == 16) round_rows(x, rows, w.given, rounded, w.cells());
  else if (w.room()) fill_up(x, rows, w.given, room, w.inner), x = room;
  auto levels = [&](auto p, const auto* cells) {
    typedef decltype(p) P;
    linear_quantised<P>(cells, rows, w.inner / P::VALUES, w.packed, w.bits, w.bias, w.size, out, num_threads);
  };
  if (w.bits == 32)
    linear<Fp32>(x, rows, w.inner, reinterpret_cast<const float*>(w.packed), w.bias, w.size, out, num_threads);
  else if (w.bits == 16)
    linear<Bf16>(rounded, rows, w.cells(), reinterpret_cast<const int32_t*>(w.packed), w.bias, w.size, out, num_threads);
  else if (w.inputs == 8) levels(Int8{}, grouped);
  else if (w.inputs == 16) levels(Bf16{}, rounded);
  else levels(Fp32{}, x);
}

// residual += delta (where given); out = residual / rms(residual) * weight. All [rows, size].
inline void add_norm(float* residual, const float* delta, const float* weight, float eps, int64_t rows, int64_t size, float* out) {
#pragma omp for
  for (int64_t r = 0; r < rows; r++) {
    float* x = residual + r * size;
    double sum = 0;
    for (int64_t part = 0; part < size; part += 256) {
      float s = 0;
      const int64_t end = std::min(size, part + 256);
      if (delta) for (int64_t i = part; i < end; i++) x[i] += delta[r * size + i];
#pragma omp simd reduction(+ : s)
      for (int64_t i = part; i < end; i++) s += x[i] * x[i];
      sum += s;
    }
    const float scale = 1.0 / std::sqrt(sum / size + eps);
    for (int64_t i = 0; i < size; i++) out[r * size + i] = x[i] * scale * weight[i];
  }
}

// out[r, i] = silu(x[r, i]) * x[r, size + i]; x: [rows, 2 size].
inline void swiglu(const float* x, int64_t rows, int64_t size, float* out) {
#pragma omp for
  for (int64_t r = 0; r < rows; r++) {
    const float *gate = x + r * 2 * size, *up = gate + size;
    int64_t i = 0;
    for (; i + VL <= size; i += VL) {
      vec g = load(gate + i);
      vec e = exp2v((g < 0 ? g : -g) * splat(1.44269504f), vec{});  // exp(-|g|): never overflows
      vec sigmoid = (g < 0 ? e : splat(1.f)) / (e + splat(1.f));
      store(out + r * size + i, g * sigmoid * load(up + i));
    }
    for (; i < size; i++) out[r * size + i] = gate[i] / (1.f + std::exp(-gate[i])) * up[i];
  }
}

struct Rotation {
  const int64_t* positions;  // of rows
  const float *cos, *sin;    // [positions, dim / 2]
};

// Rotates a row's heads in place by c and s [dim / 2], after an optional norm per head.
inline void rotate(float* x, int64_t heads, int64_t dim, const float* c, const float* s, const float* norm, float eps) {
  const int64_t half = dim / 2;
  for (int64_t h = 0; h < heads; h++) {
    float *a = x + h * dim, *b = a + half;
    if (norm) {
      float sum = 0;
      for (int64_t d = 0; d < dim; d++) sum += a[d] * a[d];
      const float scale = 1.f / std::sqrt(sum / dim + eps);
      for (int64_t d = 0; d < dim; d++) a[d] *= scale * norm[d];
    }
    for (int64_t d = 0; d < half; d++) {
      const float p = a[d], n = b[d];
      a[d] = p * c[d] - n * s[d];
      b[d] = n * c[d] + p * s[d];
    }
  }
}

// Rotates heads of queries and keys, which begin each row of `stride` values, to its position.
inline void rotate(float* x, int64_t stride, int64_t rows, const Heads& heads, const Rotation& rotation, const float* q_norm,
                   const float* k_norm, float eps) {
#pragma omp for
  for (int64_t r = 0; r < rows; r++) {
    const int64_t at = rotation.positions[r] * heads.dim / 2;
    float *q = x + r * stride, *k = q + heads.queries * heads.dim;
    rotate(q, heads.queries, heads.dim, rotation.cos + at, rotation.sin + at, q_norm, eps);
    rotate(k, heads.keys, heads.dim, rotation.cos + at, rotation.sin + at, k_norm, eps);
  }
}

// What the steps of a layer hand to one another, in memory from outside.
struct Room {
  float *normed, *wide, *gated, *qkv, *attended, *product;
  int64_t num_floats = 0;

  Room(const Layer& layer, int64_t rows, float* memory) {
    auto take = [&](int64_t size) { return memory + std::exchange(num_floats, num_floats + rows * size); };
    normed = take(layer.qkv.given), wide = take(layer.gate_up.size), gated = take(layer.down.given);
    qkv = take(layer.qkv.size), attended = take(layer.o.given);
    product = take(std::max({layer.qkv.room(), layer.o.room(), layer.gate_up.room(), layer.down.room()}));
  }
};

// residual += delta; qkv: the projection of its norm, [rows, qkv.size], with the heads of queries and keys in their places.
inline void project(const Layer& layer, float* residual, const float* delta, int64_t rows, const Rotation& rotation,
                    const Heads& heads, float eps, const Room& room, float* qkv, int64_t num_threads) {
  add_norm(residual, delta, layer.input_norm, eps, rows, layer.qkv.given, room.normed);
  product(layer.qkv, room.normed, rows, room.product, qkv, num_threads);
  rotate(qkv, layer.qkv.size, rows, heads, rotation, layer.q_norm, layer.k_norm, eps);
}

// residual += the projection of `attended`; delta: the MLP of its norm. Both [rows, hidden].
inline void feed(const Layer& layer, float* residual, const float* attended, int64_t rows, float eps, const Room& room,
                 float* delta, int64_t num_threads) {
  product(layer.o, attended, rows, room.product, delta, num_threads);
  add_norm(residual, delta, layer.post_norm, eps, rows, layer.o.size, room.normed);
  product(layer.gate_up, room.normed, rows, room.product, room.wide, num_threads);
  swiglu(room.wide, rows, layer.down.given, room.gated);
  product(layer.down, room.gated, rows, room.product, delta, num_threads);
}

// Copies K and V of some rows of qkv to `to`, [2, keys' heads, num, dim].
inline void keep(const float* qkv, int64_t stride, const int64_t* rows, int64_t num, const Heads& heads, float* to) {
#pragma omp for
  for (int64_t plane = 0; plane < 2 * heads.keys; plane++)
    for (int64_t r = 0; r < num; r++)
      std::memcpy(to + (plane * num + r) * heads.dim, qkv + rows[r] * stride + (heads.queries + plane) * heads.dim, heads.dim * 4);
}

}  // namespace
