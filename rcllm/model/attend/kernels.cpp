// The CPU kernels: attention over segments, products with packed matrices, and the element-wise steps between them.
//
// Knows raw pointers and strides only; `native.py` builds it, checks every argument and is its one caller.
// Vector width is chosen by the compiler's target (AVX-512, AVX2, or 4 lanes), so the library is cached per processor.
//
// Attention computes the transposed product: S^T = K Q^T and O^T = V^T P^T. Queries are packed once as [dim, rows], and keys
// and values are read as they lie in their block, row by row: no transposition, no gather. The softmax runs along the key
// axis, which is the slow axis of S^T, so it needs no horizontal reductions. A key of a segment is turned to its
// place in the prompt by one rotation, the same for the whole segment (RoPE: R(o + j) = R(o) R(j)), on its way into a
// scratch tile that stays in the L2 cache.

#include "cached.h"
#include "products.h"
#include "quantised.h"
#include "vectors.h"

namespace {

constexpr int ROW_TILE = 192;   // query rows (tokens × heads per KV head) of one work item
constexpr int MIN_TOKENS = 12;  // a tile with fewer spends its time on reading keys
constexpr int KEY_TILE = 96;    // keys per softmax step
constexpr float HIDDEN = -1048576.f;  // score of a masked pair: far below any other, and still within exp2v
// Of a sum of zeros. Weights that shrank twice may be left in one below what fp32 holds exactly, by the tiles that they fell in.
constexpr float NOTHING = 0x1p-80f;

// ---- attention of one row tile of one KV head ----

struct Segment {  // one row of the segment table, int64 each; of a block [layers, 2, kv_heads, block_len, dim]
  int64_t pointer, block_len, start, len, base, dtype;

  const char* rows(int64_t plane, int64_t kv_heads, int64_t head, int64_t dim) const {  // plane: 2 · layer, + 1 for values
    const int64_t row = (plane * kv_heads + head) * block_len + start;
    return reinterpret_cast<const char*>(pointer) + row * row_bytes(dim, dtype);
  }
};
struct Group {  // rows that attend to keys in one buffer (their own among them) and to segments in place
  int64_t row_start, num_rows, key_start, num_keys, seg_start, num_segs;
  int64_t sees_segment, sees, num_blocks;  // locate and size its masks
};
struct Row {  // of a fresh row: its block, its place in that block, and the keys of its group that it reaches
  int32_t block, offset, first, last, dense;  // sees keys first … last - 1; dense: all of them
};
struct Key {
  int32_t block, offset;
};

template <class P>
struct Scratch {
  typedef typename P::Cell Cell;
  Cell *q, *k, *v;
  float *s, *o, *m, *l;
  explicit Scratch(int dim) {
    auto room = [](size_t n) { return std::aligned_alloc(64, (n * 4 + 63) / 64 * 64); };
    auto cells = [&](size_t n) { return static_cast<Cell*>(room(n)); };
    auto floats = [&](size_t n) { return static_cast<float*>(room(n)); };
    q = cells((size_t)dim * ROW_TILE), k = cells((size_t)KEY_TILE * dim), v = cells((size_t)KEY_TILE * dim);
    s = floats((size_t)KEY_TILE * ROW_TILE), o = floats((size_t)dim * ROW_TILE), m = floats(ROW_TILE), l = floats(ROW_TILE);
  }
  ~Scratch() {
    for (void* p : {(void*)q, (void*)k, (void*)v, (void*)s, (void*)o, (void*)m, (void*)l}) std::free(p);
  }
};

// The weights of keys in lanes of rows: scores s, `ROW_TILE` apart, become cells in place; returns the sum of `sum` and the
// weights as they are multiplied, key after key.
vec weigh(Fp32, float* s, int keys, vec top, vec sum) {
  for (int j = 0; j < keys; j++) {
    const vec p = exp2v(load(s + j * ROW_TILE), top);
    store(s + j * ROW_TILE, p);
    sum += p;
  }
  return sum;
}
vec weigh(Bf16, float* s, int keys, vec top, vec sum) {
  for (int j = 0; j < keys; j += 2) {
    const ivec first = round_number(exp2v(load(s + j * ROW_TILE), top)) & HIGH;
    const ivec second = j + 1 < keys ? round_number(exp2v(load(s + (j + 1) * ROW_TILE), top)) : ivec{};
    store(s + j / 2 * ROW_TILE, (vec)pair(second, first));
    sum = sum + (vec)first + (vec)(second & HIGH);
  }
  return sum;
}

// Folds one key tile, whose masked scores lie in s[keys, r0..r1), into the running maximum, sum and output.
// The maximum is a whole number, so what is already summed shrinks by a power of two, which rounds nothing; and key after
// key is added to one sum. So a row's result depends on its keys and their order alone, not on how tiles divide them, nor
// on masked keys among them.
template <class P>
void fold(Scratch<P>& w, int dim, int keys, int r0, int r1, Operand<P> v) {
  for (int r = r0; r < r1; r += VL) {
    const vec old = load(w.m + r);
    vec top = old;
    for (int j = 0; j < keys; j++) top = vmax(top, load(w.s + j * ROW_TILE + r));
    top = whole(top);
    bool moved = false;
    for (int i = 0; i < VL; i++) moved |= top[i] != old[i];
    const vec shrink = exp2v(old, top);
    store(w.l + r, weigh(P{}, w.s + r, keys, top, load(w.l + r) * shrink));
    if (moved) {
      store(w.m + r, top);
      for (int d = 0; d < dim; d++) store(w.o + d * ROW_TILE + r, load(w.o + d * ROW_TILE + r) * shrink);
    }
  }
  const auto* weights = reinterpret_cast<const typename P::Cell*>(w.s + r0);
  const int cells = (keys + P::VALUES - 1) / P::VALUES;
  gemm<P>(dim, r1 - r0, cells, v.data, v.rows, v.columns, weights, ROW_TILE, w.o + r0, ROW_TILE, true);
}

}  // namespace

extern "C" {

// q: rows of the fused projection, k, v: rows of keys and values, all rotated to their positions; row r of q starts at
// q + r * stride, key r at k + r * kv_stride.
// bf16: whether both products are computed in bf16.
// out: [rows, heads * dim]; lse: [rows, heads], natural logarithm, or null.
// sees_segment: bytes [num_rows, num_segs] per group; sees: bytes [num_blocks, num_blocks] per group, which blocks see
// which; inside its own block a row sees what precedes it. cos, sin: [positions, dim / 2].
void rcllm_attend(const float* q, int64_t stride, const float* k, const float* v, int64_t kv_stride, float* out, float* lse,
                  int64_t heads, int64_t kv_heads, int64_t dim, int64_t layer, float scale, const Group* groups, int64_t num_groups,
                  const Segment* segments, const uint8_t* sees_segment, const uint8_t* sees_block, const Row* table,
                  const Key* key_table, const float* cos, const float* sin, int64_t bf16, int64_t num_threads) {
  const int share = heads / kv_heads, half = dim / 2;
  // Row tiles are as large as fits, then made smaller until every thread has its equal share of work items.
  auto tiles_of = [&](const Group& group) {
    const int64_t most = ROW_TILE / share;
    int64_t tiles = (group.num_rows + most - 1) / most;
    auto uneven = [&] { return num_groups * tiles * kv_heads < 8 * num_threads && tiles * kv_heads % num_threads; };
    while (uneven() && group.num_rows / (tiles + 1) >= MIN_TOKENS) tiles++;
    return tiles;
  };
  int64_t num_items = 0;
  for (int64_t g = 0; g < num_groups; g++) num_items += tiles_of(groups[g]) * kv_heads;

  auto run = [&](auto product) {
    typedef decltype(product) P;
    const int cells = dim / P::VALUES;
#pragma omp parallel num_threads(num_threads)
  {
    Scratch<P> w(dim);
#pragma omp for schedule(dynamic, 1)
    for (int64_t item = num_items - 1; item >= 0; item--) {
      // which group, row tile and head; counted from the end, where causal rows have most to do
      int64_t rest = item, g = 0;
      for (;; g++) {
        int64_t n = tiles_of(groups[g]) * kv_heads;
        if (rest < n) break;
        rest -= n;
      }
      const Group& group = groups[g];
      const int head = rest % kv_heads;
      const int64_t tiles = tiles_of(group), index = rest / kv_heads;
      const int64_t first = group.num_rows * index / tiles;  // first row of the tile, within the group
      const int num = group.num_rows * (index + 1) / tiles - first, rows = num * share;
      const int padded = (rows + VL - 1) / VL * VL;
      const float* q0 = q + (group.row_start + first) * stride + (int64_t)head * share * dim;
      for (int c = 0; c < cells; c++)
        for (int r = rows; r < padded; r++) w.q[c * ROW_TILE + r] = 0;
      for (int t = 0; t < num; t++)
        for (int h = 0; h < share; h++)
          for (int c = 0; c < cells; c++)
            w.q[c * ROW_TILE + t * share + h] = P::cell(q0 + t * stride + h * dim + c * P::VALUES, scale);
      for (int d = 0; d < dim; d++) std::fill(w.o + d * ROW_TILE, w.o + d * ROW_TILE + padded, 0.f);
      std::fill(w.m, w.m + padded, HIDDEN);
      std::fill(w.l, w.l + padded, 0.f);

      for (int64_t i = 0; i < group.num_segs; i++) {
        const Segment& seg = segments[group.seg_start + i];
        const uint8_t* sees = sees_segment + group.sees_segment + first * group.num_segs + i;
        int t0 = 0, t1 = num;
        while (t0 < t1 && !sees[t0 * group.num_segs]) t0++;
        while (t1 > t0 && !sees[(t1 - 1) * group.num_segs]) t1--;
        if (t0 == t1) continue;
        const int r0 = t0 * share / VL * VL, r1 = (t1 * share + VL - 1) / VL * VL;
        const char *ks = seg.rows(layer * 2, kv_heads, head, dim), *vs = seg.rows(layer * 2 + 1, kv_heads, head, dim);
        for (int64_t j = 0; j < seg.len; j += KEY_TILE) {
          const int keys = std::min<int64_t>(KEY_TILE, seg.len - j);
          const int64_t step = row_bytes(dim, seg.dtype);
          const float* angle = seg.base ? cos + seg.base * half : nullptr;
          const Operand<P> kj = keys_of<P>(ks + j * step, step, seg.dtype, keys, dim, angle, sin + seg.base * half, w.k);
          gemm<P>(keys, r1 - r0, cells, kj.data, kj.rows, kj.columns, w.q + r0, ROW_TILE, w.s + r0, ROW_TILE, false);
          for (int r = r0; r < r1; r++) {
            const int t = r / share;
            if (r < rows && sees[t * group.num_segs]) continue;
            for (int n = 0; n < keys; n++) w.s[n * ROW_TILE + r] = HIDDEN;
          }
          fold<P>(w, dim, keys, r0, r1, values_of(vs + j * step, step, seg.dtype, keys, dim, w.v));
        }
      }

      const Key* others = key_table + group.key_start;
      const Row* own = table + group.row_start + first;
      const uint8_t* sees = sees_block + group.sees;
      int64_t lo = group.num_keys, hi = 0;
      for (int t = 0; t < num; t++) lo = std::min<int64_t>(lo, own[t].first), hi = std::max<int64_t>(hi, own[t].last);
      const float* k0 = k + group.key_start * kv_stride + head * dim;
      const float* v0 = v + group.key_start * kv_stride + head * dim;
      const int64_t step = kv_stride * 4;
      for (int64_t j = lo; j < hi; j += KEY_TILE) {
        const int keys = std::min<int64_t>(KEY_TILE, hi - j);
        int t0 = 0, t1 = num;
        auto outside = [&](int t) { return own[t].first >= j + keys || own[t].last <= j; };
        while (t0 < t1 && outside(t0)) t0++;
        while (t1 > t0 && outside(t1 - 1)) t1--;
        if (t0 == t1) continue;
        const int r0 = t0 * share / VL * VL, r1 = (t1 * share + VL - 1) / VL * VL;
        const char *kj = reinterpret_cast<const char*>(k0) + j * step, *vj = reinterpret_cast<const char*>(v0) + j * step;
        const Operand<P> fresh = keys_of<P>(kj, step, F32, keys, dim, nullptr, nullptr, w.k);
        gemm<P>(keys, r1 - r0, cells, fresh.data, fresh.rows, fresh.columns, w.q + r0, ROW_TILE, w.s + r0, ROW_TILE, false);
        for (int t = r0 / share; t * share < r1; t++) {
          const bool dense = t < num && own[t].dense && own[t].first <= j;
          const int h0 = std::max(t * share, r0), h1 = std::min((t + 1) * share, r1);
          for (int n = dense ? std::max<int64_t>(0, own[t].last - j) : 0; n < keys; n++) {
            const Key& key = others[j + n];
            if (t < num && (key.block == own[t].block ? key.offset <= own[t].offset
                                                      : sees[own[t].block * group.num_blocks + key.block]))
              continue;
            for (int h = h0; h < h1; h++) w.s[n * ROW_TILE + h] = HIDDEN;
          }
        }
        fold<P>(w, dim, keys, r0, r1, values_of(vj, step, F32, keys, dim, w.v));
      }

      for (int t = 0; t < num; t++)
        for (int h = 0; h < share; h++) {
          const int r = t * share + h;
          const bool any = w.m[r] > HIDDEN / 2;
          const float norm = any ? 1.f / w.l[r] : 0.f;
          const int64_t row = group.row_start + first + t;
          float* o = out + (row * heads + head * share + h) * dim;
          for (int d = 0; d < dim; d++) {
            const float x = w.o[d * ROW_TILE + r] * norm;
            o[d] = std::fabs(x) < NOTHING ? 0.f : x;
          }
          if (lse) lse[row * heads + head * share + h] = any ? (w.m[r] + std::log2(w.l[r])) * 0.69314718056f : -INFINITY;
        }
    }
  }
  };
  bf16 ? run(Bf16{}) : run(Fp32{});
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
      const char *ks = seg.rows(layer * 2, kv_heads, head, dim), *vs = seg.rows(layer * 2 + 1, kv_heads, head, dim);
      read_rows<Fp32>(ks, step, seg.dtype, seg.len, dim, seg.base ? c : nullptr, s, k, stride);
      read_rows<Fp32>(vs, step, seg.dtype, seg.len, dim, nullptr, nullptr, k + kv_heads * dim, stride);
    }
}

int64_t rcllm_int8_group() { return INT8_GROUP; }

// residual += delta (where given); out = residual / rms(residual) * weight. All [rows, size].
void rcllm_add_norm(float* residual, const float* delta, const float* weight, float eps, int64_t rows, int64_t size,
                    float* out, int64_t num_threads) {
#pragma omp parallel for num_threads(num_threads)
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
void rcllm_swiglu(const float* x, int64_t rows, int64_t size, float* out, int64_t num_threads) {
#pragma omp parallel for num_threads(num_threads)
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

// Rotates the heads of each row in place to its position, after an optional norm per head (Qwen3).
// x: rows of `stride`, whose first `heads * dim` values are the heads.
void rcllm_rotate(float* x, int64_t stride, int64_t rows, int64_t heads, int64_t dim, const int64_t* positions,
                  const float* cos, const float* sin, const float* norm, float eps, int64_t num_threads) {
  const int64_t half = dim / 2;
#pragma omp parallel for num_threads(num_threads)
  for (int64_t r = 0; r < rows; r++) {
    const float *c = cos + positions[r] * half, *s = sin + positions[r] * half;
    for (int64_t h = 0; h < heads; h++) {
      float *a = x + r * stride + h * dim, *b = a + half;
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
}

}  // extern "C"
