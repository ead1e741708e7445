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

#include "products.h"
#include "vectors.h"

namespace {

constexpr int ROW_TILE = 192;   // query rows (tokens × heads per KV head) of one work item
constexpr int MIN_TOKENS = 12;  // a tile with fewer spends its time on reading keys
constexpr int KEY_TILE = 96;    // keys per softmax step
constexpr float HIDDEN = -1048576.f;  // score of a masked pair: far below any other, and still within exp2v
// A masked key weighs up to 2^-126 (exp2v). That is lost in any sum but one of zeros, which values in int8 often are.
constexpr float NOTHING = 0x1p-80f;

// ---- reading cached K and V ----

enum Dtype : int64_t { F32 = 0, F16 = 1, BF16 = 2, I8 = 3 };

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
  if (dtype == I8) {
    const vec levels = __builtin_convertvector(*reinterpret_cast<const bvec_u*>(row + d), vec);
    return levels * splat(from_bf16(row + dim + d / INT8_GROUP * 2));
  }
  hvec h = *reinterpret_cast<const hvec_u*>(reinterpret_cast<const uint16_t*>(row) + d);
  if (dtype == F16) return __builtin_convertvector((f16vec)h, vec);
  return (vec)(__builtin_convertvector(h, ivec) << 16);
}

// Rows of `dim` values: widened and, for keys, rotated by the angle whose cos and sin are given ([dim / 2], or null).
void read_rows(const char* src, int64_t dtype, int rows, int dim, const float* cos, const float* sin, float* dst,
               int64_t stride) {
  const int half = dim / 2;
  for (int r = 0; r < rows; r++, dst += stride, src += row_bytes(dim, dtype)) {
    if (!cos) {
      for (int d = 0; d < dim; d += VL) store(dst + d, widen(src, d, dim, dtype));
    } else {
      for (int d = 0; d < half; d += VL) {
        vec a = widen(src, d, dim, dtype), b = widen(src, d + half, dim, dtype), c = load(cos + d), s = load(sin + d);
        store(dst + d, a * c - b * s);
        store(dst + d + half, b * c + a * s);
      }
    }
  }
}

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

struct Scratch {
  float *q, *s, *o, *m, *l, *k, *v;
  explicit Scratch(int dim) {
    auto floats = [](size_t n) { return static_cast<float*>(std::aligned_alloc(64, (n * 4 + 63) / 64 * 64)); };
    q = floats((size_t)dim * ROW_TILE), s = floats((size_t)KEY_TILE * ROW_TILE), o = floats((size_t)dim * ROW_TILE);
    m = floats(ROW_TILE), l = floats(ROW_TILE), k = floats((size_t)KEY_TILE * dim), v = floats((size_t)KEY_TILE * dim);
  }
  ~Scratch() { for (float* p : {q, s, o, m, l, k, v}) std::free(p); }
};

// Folds one key tile, whose masked scores lie in s[keys, r0..r1), into the running maximum, sum and output.
// The maximum is a whole number, so what is already summed shrinks by a power of two, which rounds nothing; and key after
// key is added to one sum. So a row's result depends on its keys and their order alone, not on how tiles divide them, nor
// on masked keys among them.
void fold(Scratch& w, int dim, int keys, int r0, int r1, const float* v, int64_t v_stride) {
  for (int r = r0; r < r1; r += VL) {
    const vec old = load(w.m + r);
    vec top = old;
    for (int j = 0; j < keys; j++) top = vmax(top, load(w.s + j * ROW_TILE + r));
    top = whole(top);
    bool moved = false;
    for (int i = 0; i < VL; i++) moved |= top[i] != old[i];
    const vec shrink = exp2v(old, top);
    vec sum = load(w.l + r) * shrink;
    for (int j = 0; j < keys; j++) {
      vec p = exp2v(load(w.s + j * ROW_TILE + r), top);
      store(w.s + j * ROW_TILE + r, p);
      sum += p;
    }
    store(w.l + r, sum);
    if (moved) {
      store(w.m + r, top);
      for (int d = 0; d < dim; d++) store(w.o + d * ROW_TILE + r, load(w.o + d * ROW_TILE + r) * shrink);
    }
  }
  gemm(dim, r1 - r0, keys, v, 1, v_stride, w.s + r0, ROW_TILE, w.o + r0, ROW_TILE, true);
}

}  // namespace

extern "C" {

// q: rows of the fused projection, k, v: rows of keys and values, all rotated to their positions; row r of q starts at
// q + r * stride, key r at k + r * kv_stride.
// out: [rows, heads * dim]; lse: [rows, heads], natural logarithm, or null.
// sees_segment: bytes [num_rows, num_segs] per group; sees: bytes [num_blocks, num_blocks] per group, which blocks see
// which; inside its own block a row sees what precedes it. cos, sin: [positions, dim / 2].
void rcllm_attend(const float* q, int64_t stride, const float* k, const float* v, int64_t kv_stride, float* out, float* lse,
                  int64_t heads, int64_t kv_heads, int64_t dim, int64_t layer, float scale, const Group* groups, int64_t num_groups,
                  const Segment* segments, const uint8_t* sees_segment, const uint8_t* sees_block, const Row* table,
                  const Key* key_table, const float* cos, const float* sin, int64_t num_threads) {
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

#pragma omp parallel num_threads(num_threads)
  {
    Scratch w(dim);
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
      for (int d = 0; d < dim; d++)
        for (int r = rows; r < padded; r++) w.q[d * ROW_TILE + r] = 0.f;
      for (int t = 0; t < num; t++)
        for (int h = 0; h < share; h++)
          for (int d = 0; d < dim; d++) w.q[d * ROW_TILE + t * share + h] = q0[t * stride + h * dim + d] * scale;
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
          const bool turned = seg.base != 0 || seg.dtype != F32;
          const char *kj = ks + j * row_bytes(dim, seg.dtype), *vj = vs + j * row_bytes(dim, seg.dtype);
          const float *kt = reinterpret_cast<const float*>(kj), *vt = reinterpret_cast<const float*>(vj);
          if (turned)
            read_rows(kj, seg.dtype, keys, dim, seg.base ? cos + seg.base * half : nullptr, sin + seg.base * half, w.k, dim), kt = w.k;
          if (seg.dtype != F32) read_rows(vj, seg.dtype, keys, dim, nullptr, nullptr, w.v, dim), vt = w.v;
          gemm(keys, r1 - r0, dim, kt, dim, 1, w.q + r0, ROW_TILE, w.s + r0, ROW_TILE, false);
          for (int r = r0; r < r1; r++) {
            const int t = r / share;
            if (r < rows && sees[t * group.num_segs]) continue;
            for (int n = 0; n < keys; n++) w.s[n * ROW_TILE + r] = HIDDEN;
          }
          fold(w, dim, keys, r0, r1, vt, dim);
        }
      }

      const Key* others = key_table + group.key_start;
      const Row* own = table + group.row_start + first;
      const uint8_t* sees = sees_block + group.sees;
      int64_t lo = group.num_keys, hi = 0;
      for (int t = 0; t < num; t++) lo = std::min<int64_t>(lo, own[t].first), hi = std::max<int64_t>(hi, own[t].last);
      const float* k0 = k + group.key_start * kv_stride + head * dim;
      const float* v0 = v + group.key_start * kv_stride + head * dim;
      for (int64_t j = lo; j < hi; j += KEY_TILE) {
        const int keys = std::min<int64_t>(KEY_TILE, hi - j);
        int t0 = 0, t1 = num;
        auto outside = [&](int t) { return own[t].first >= j + keys || own[t].last <= j; };
        while (t0 < t1 && outside(t0)) t0++;
        while (t1 > t0 && outside(t1 - 1)) t1--;
        if (t0 == t1) continue;
        const int r0 = t0 * share / VL * VL, r1 = (t1 * share + VL - 1) / VL * VL;
        gemm(keys, r1 - r0, dim, k0 + j * kv_stride, kv_stride, 1, w.q + r0, ROW_TILE, w.s + r0, ROW_TILE, false);
        for (int t = r0 / share; t * share < r1; t++) {
          if (t < num && own[t].dense && own[t].first <= j && own[t].last >= j + keys) continue;
          const int h0 = std::max(t * share, r0), h1 = std::min((t + 1) * share, r1);
          for (int n = 0; n < keys; n++) {
            const Key& key = others[j + n];
            if (t < num && (key.block == own[t].block ? key.offset <= own[t].offset
                                                      : sees[own[t].block * group.num_blocks + key.block]))
              continue;
            for (int h = h0; h < h1; h++) w.s[n * ROW_TILE + h] = HIDDEN;
          }
        }
        fold(w, dim, keys, r0, r1, v0 + j * kv_stride, kv_stride);
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
      read_rows(seg.rows(layer * 2, kv_heads, head, dim), seg.dtype, seg.len, dim, seg.base ? c : nullptr, s, k, stride);
      read_rows(seg.rows(layer * 2 + 1, kv_heads, head, dim), seg.dtype, seg.len, dim, nullptr, nullptr,
                k + kv_heads * dim, stride);
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
