// One tile of attention: some rows of queries of one KV head, and the running softmax over the keys that they are shown.
//
// Two layouts, one for many rows and one for few; whoever drives them sees `show`, `score` and `fold`.
// Invariant: both compute, bit for bit, the same: each score is summed along the dimensions, and keys are added one after
// the other. The maximum is a whole number, so what is already summed shrinks by a power of two, which rounds nothing. So a
// row's result depends on its keys and their order alone, not on how tiles divide them, nor on masked keys among them.

#pragma once

#include <numeric>
#include <vector>

#include "cached.h"

namespace {

constexpr int ROW_TILE = 240;  // query rows (tokens × heads per KV head) of one tile
constexpr int KEY_TILE = 96;   // keys per softmax step
constexpr int FEW = VL / 2;    // rows up to which lanes are better filled with keys than with rows
constexpr float HIDDEN = -1048576.f;  // score of a masked pair: far below any other, and still within exp2v
// Of a sum of zeros. Weights that shrank twice may be left in one below what fp32 holds exactly, by the tiles that they fell in.
constexpr float NOTHING = 0x1p-80f;

struct Queries {  // rows of `share` heads of `dim` values, one row for each token
  const float* data;
  int64_t stride;
  int tokens, share, dim;
  float scale;

  int rows() const { return tokens * share; }
  const float* row(int r) const { return data + r / share * stride + r % share * dim; }
};

struct Answers {  // where outputs and logsumexps go; heads lie side by side
  float *out, *lse;
  int64_t heads;
};

// Room for a tile; what lies where in q, s and o is a layout's own affair. Each thread keeps its room from call to call, for
// pages that are new each time are slow to write to.
template <class P>
struct Scratch {
  typedef typename P::Cell Cell;
  Cell *q, *k, *t, *v;  // queries; keys, also transposed; values
  float *s, *o, *m, *l;  // scores; sums of values, maxima and sums of weights so far
  explicit Scratch(size_t dim) {
    thread_local std::vector<vec> room;
    const size_t rows = ROW_TILE * dim, keys = KEY_TILE * dim, sizes[] = {rows, keys, keys, keys, ROW_TILE * KEY_TILE, rows, ROW_TILE, ROW_TILE};
    room.resize(std::max(room.size(), std::accumulate(std::begin(sizes), std::end(sizes), size_t{0}) / VL));
    float* next = reinterpret_cast<float*>(room.data());
    float* parts[8];
    for (int i = 0; i < 8; i++) parts[i] = next, next += sizes[i];
    auto cells = [&](int i) { return reinterpret_cast<Cell*>(parts[i]); };
    q = cells(0), k = cells(1), t = cells(2), v = cells(3), s = parts[4], o = parts[5], m = parts[6], l = parts[7];
  }
};

// Query r as cells.
template <class P>
void put_query(const Queries& queries, int r, typename P::Cell* to) {
  for (int d = 0; d < queries.dim; d += VL) P::put(to, d, load(queries.row(r) + d) * splat(queries.scale));
}

// VL rows of cells, `step` apart, as columns, `stride` apart; of the rows, `num` are there.
template <class Cell>
void transposed(const Cell* from, int64_t step, int num, Cell* to, int64_t stride) {
  vec x[VL];
  for (int i = 0; i < VL; i++) x[i] = i < num ? (vec)load(from + i * step) : vec{};
  transpose(x);
  for (int i = 0; i < VL; i++) store(reinterpret_cast<float*>(to + i * stride), x[i]);
}

// Which row of [tokens, heads] row r of a tile is.
inline int64_t place(const Queries& queries, const Answers& answers, int r) {
  return r / queries.share * answers.heads + r % queries.share;
}

inline vec without_residue(vec x) { return ((x < splat(NOTHING)) & (x > splat(-NOTHING))) ? vec{} : x; }

// In natural logarithms; -inf where a row saw nothing.
template <class P>
void put_lse(const Scratch<P>& w, const Queries& queries, const Answers& answers) {
  if (!answers.lse) return;
  for (int r = 0; r < queries.rows(); r++) {
    const bool any = w.m[r] > HIDDEN / 2;
    answers.lse[place(queries, answers, r)] = any ? (w.m[r] + std::log2(w.l[r])) * 0.69314718056f : -INFINITY;
  }
}

// Many rows: S^T = K Q^T and O^T = V^T P^T. Lanes are rows, so the softmax needs no horizontal reductions, and keys and
// values are read as they lie in their block.
template <class P>
class Wide {
 public:
  static constexpr int ROWS = VL;  // are shown keys together

  Wide(Scratch<P>& scratch, const Queries& queries) : w(scratch), dim(queries.dim), cells(queries.dim / P::VALUES) {
    const int rows = queries.rows(), padded = (rows + VL - 1) / VL * VL;
    for (int r = 0; r < padded; r += VL) {
      const int num = std::min(VL, rows - r);
      for (int i = 0; i < num; i++) put_query<P>(queries, r + i, w.k + i * cells);
      for (int c = 0; c < cells; c += VL) transposed(w.k + c, cells, num, w.q + c * ROW_TILE + r, ROW_TILE);
    }
    for (int d = 0; d < dim; d++) std::fill(w.o + d * ROW_TILE, w.o + d * ROW_TILE + padded, 0.f);
    std::fill(w.m, w.m + padded, HIDDEN);
    std::fill(w.l, w.l + padded, 0.f);
  }

  float& score(int key, int r) { return w.s[key * ROW_TILE + r]; }

  // Scores of rows r0 … r1 - 1.
  void show(const Rows& keys, int num, int r0, int r1) {
    const Operand<P> k = keys_of<P>(keys, num, dim, w.k);
    gemm<P>(num, r1 - r0, cells, k.data, k.step, 1, w.q + r0, ROW_TILE, w.s + r0, ROW_TILE, false);
  }

  // Adds the values of the keys that were shown, by their scores as they are now.
  void fold(const Rows& values, int num, int r0, int r1) {
    for (int r = r0; r < r1; r += VL) {
      const vec old = load(w.m + r);
      vec top = old;
      for (int j = 0; j < num; j++) top = vmax(top, load(w.s + j * ROW_TILE + r));
      top = whole(top);
      const vec shrink = exp2v(old, top);
      store(w.l + r, weigh(P{}, w.s + r, num, top, load(w.l + r) * shrink));
      if (!any(top != old)) continue;
      store(w.m + r, top);
      for (int d = 0; d < dim; d++) store(w.o + d * ROW_TILE + r, load(w.o + d * ROW_TILE + r) * shrink);
    }
    const Operand<P> v = values_of(values, num, dim, w.v);
    const auto* weights = reinterpret_cast<const typename P::Cell*>(w.s + r0);
    const int steps = (num + P::VALUES - 1) / P::VALUES;
    gemm<P>(dim, r1 - r0, steps, v.data, 1, v.step, weights, ROW_TILE, w.o + r0, ROW_TILE, true);
  }

  void finish(const Queries& queries, const Answers& answers) {
    const int rows = queries.rows();
    for (int r = 0; r < rows; r += VL) {
      const vec sum = load(w.l + r), norm = load(w.m + r) > splat(HIDDEN / 2) ? splat(1.f) / sum : vec{};
      for (int d = 0; d < dim; d += VL) {
        vec x[VL];
        for (int i = 0; i < VL; i++) x[i] = without_residue(load(w.o + (d + i) * ROW_TILE + r) * norm);
        transpose(x);
        for (int i = 0; i < VL && r + i < rows; i++) store(answers.out + place(queries, answers, r + i) * dim + d, x[i]);
      }
    }
    put_lse(w, queries, answers);
  }

 private:
  Scratch<P>& w;
  const int dim, cells;

  // Scores of VL rows become weights in place, as cells; returns the sum of `sum` and the weights as they are multiplied,
  // key after key.
  static vec weigh(Fp32, float* s, int keys, vec top, vec sum) {
    for (int j = 0; j < keys; j++) {
      const vec p = exp2v(load(s + j * ROW_TILE), top);
      store(s + j * ROW_TILE, p);
      sum += p;
    }
    return sum;
  }
  static vec weigh(Bf16, float* s, int keys, vec top, vec sum) {
    for (int j = 0; j < keys; j += 2) {
      const vec first = exp2v(load(s + j * ROW_TILE), top);
      const vec second = j + 1 < keys ? exp2v(load(s + (j + 1) * ROW_TILE), top) : vec{};
      const ivec both = pair(second, first);
      store(s + j / 2 * ROW_TILE, (vec)both);
      sum = sum + (vec)(both & HIGH) + (vec)(both << 16);
    }
    return sum;
  }
};

// Few rows: S = Q K^T and O = P V. Lanes are keys, which are transposed for it, and then dimensions.
template <class P>
class Narrow {
 public:
  static constexpr int ROWS = 1;

  Narrow(Scratch<P>& scratch, const Queries& queries) : w(scratch), dim(queries.dim), cells(queries.dim / P::VALUES) {
    const int rows = queries.rows();
    for (int r = 0; r < rows; r++) put_query<P>(queries, r, w.q + r * cells);
    std::fill(w.o, w.o + rows * dim, 0.f);
    std::fill(w.m, w.m + rows, HIDDEN);
    std::fill(w.l, w.l + rows, 0.f);
  }

  float& score(int key, int r) { return w.s[r * KEY_TILE + key]; }

  void show(const Rows& keys, int num, int r0, int r1) {
    const Operand<P> k = keys_of<P>(keys, num, dim, w.k);
    for (int j = 0; j < num; j += VL)
      for (int c = 0; c < cells; c += VL)
        transposed(k.data + j * k.step + c, k.step, num - j, w.t + c * KEY_TILE + j, KEY_TILE);
    const int padded = (num + VL - 1) / VL * VL;
    gemm<P>(r1 - r0, padded, cells, w.q + r0 * cells, cells, 1, w.t, KEY_TILE, w.s + r0 * KEY_TILE, KEY_TILE, false);
  }

  void fold(const Rows& values, int num, int r0, int r1) {
    const int padded = (num + VL - 1) / VL * VL;
    for (int r = r0; r < r1; r++) {
      float *s = w.s + r * KEY_TILE, *o = w.o + r * dim;
      std::fill(s + num, s + padded, HIDDEN);
      vec most = splat(w.m[r]);
      for (int j = 0; j < padded; j += VL) most = vmax(most, load(s + j));
      float largest = most[0];
      for (int i = 1; i < VL; i++) largest = std::max(largest, most[i]);
      const vec top = whole(splat(largest)), shrink = exp2v(splat(w.m[r]), top);
      for (int j = 0; j < padded; j += VL) store(s + j, exp2v(load(s + j), top));
      std::fill(s + num, s + padded, 0.f);
      w.l[r] = weigh(P{}, s, num, w.l[r] * shrink[0]);
      w.m[r] = top[0];
      for (int d = 0; d < dim; d += VL) store(o + d, load(o + d) * shrink);
    }
    const Operand<P> v = values_of(values, num, dim, w.v);
    const auto* weights = reinterpret_cast<const typename P::Cell*>(w.s + r0 * KEY_TILE);
    const int steps = (num + P::VALUES - 1) / P::VALUES;
    gemm<P>(r1 - r0, dim, steps, weights, KEY_TILE, 1, v.data, v.step, w.o + r0 * dim, dim, true);
  }

  void finish(const Queries& queries, const Answers& answers) {
    for (int r = 0; r < queries.rows(); r++) {
      const vec norm = splat(w.m[r] > HIDDEN / 2 ? 1.f / w.l[r] : 0.f);
      float* out = answers.out + place(queries, answers, r) * dim;
      for (int d = 0; d < dim; d += VL) store(out + d, without_residue(load(w.o + r * dim + d) * norm));
    }
    put_lse(w, queries, answers);
  }

 private:
  Scratch<P>& w;
  const int dim, cells;

  // Weights of one row become cells in place; returns the sum of `sum` and the weights as they are multiplied.
  static float weigh(Fp32, const float* s, int keys, float sum) {
    for (int j = 0; j < keys; j++) sum += s[j];
    return sum;
  }
  static float weigh(Bf16, float* s, int keys, float sum) {
    auto* cells = reinterpret_cast<int32_t*>(s);
    for (int j = 0; j < keys; j += VL) Bf16::put(cells, j, load(s + j));
    for (int c = 0; c < (keys + 1) / 2; c += VL) {
      const ivec both = load(cells + c);
      store(cells + c, both << 16 | (ivec)((uvec)both >> 16));
    }
    for (int j = 0; j < keys; j += 2) {
      const int32_t both = cells[j / 2];
      sum = sum + as_float(both & HIGH) + as_float((uint32_t)both << 16);
    }
    return sum;
  }
};

}  // namespace
