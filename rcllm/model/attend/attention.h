// Attention of a pass: which rows see which keys, of segments in place and of one buffer with the keys of fresh rows.
//
// Keys and values are read as they lie in their block, row by row: no gather. A key of a segment is turned to its place in
// the prompt by one rotation, the same for the whole segment (RoPE: R(o + j) = R(o) R(j)), on its way into a scratch tile
// that stays in the L2 cache.

#pragma once

#include "tiles.h"

namespace {

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

// Which rows of a tile keys are shown to: from the first token that sees them to the last, in whole steps of rows.
struct Shown {
  int share, r0, r1;

  template <class Sees>
  Shown(int tokens, int share, int step, const Sees& sees) : share(share) {
    int t0 = 0, t1 = tokens;
    while (t0 < t1 && !sees(t0)) t0++;
    while (t1 > t0 && !sees(t1 - 1)) t1--;
    r0 = t0 * share / step * step, r1 = (t1 * share + step - 1) / step * step;
  }
  bool empty() const { return r0 >= r1; }

  // f(token, its first row, one past its last); the last tokens may be missing.
  template <class F>
  void each_token(const F& f) const {
    for (int t = r0 / share; t * share < r1; t++) f(t, std::max(t * share, r0), std::min((t + 1) * share, r1));
  }
};

struct Item {  // rows of one group, `first` within the group, that are computed together
  int64_t group, first, num;
};

struct Heads {
  int64_t queries, keys, dim;
};

// What the rows of a pass attend to, the same in all layers; filled in by Python, each field 64 bits.
struct Reads {
  const Item* items;  // of at most ROW_TILE / (heads per KV head) rows, those that take longest first
  int64_t num_items;
  const Group* groups;
  const Segment* segments;
  const uint8_t* sees_segment;  // [num_rows, num_segs] per group
  const uint8_t* sees_block;    // [num_blocks, num_blocks] per group; inside its own block a row sees what precedes it
  const Row* rows;
  const Key* keys;
  const float *cos, *sin;  // [positions, dim / 2]
  Heads heads;
  int64_t bf16;  // whether both products are computed in bf16
};

// One layer of it. q: rows of the fused projection, k, v: rows of keys and values, all rotated to their positions.
struct Attention {
  const Reads& reads;
  int64_t layer;
  const float* q;
  int64_t stride;
  const float *k, *v;
  int64_t kv_stride;
  float *out, *lse;  // [rows, heads · dim]; [rows, heads], natural logarithm, or null

  template <class P>
  void compute(const Item& item, int64_t head, Scratch<P>& scratch) const {
    const Group& group = reads.groups[item.group];
    const auto [heads, kv_heads, dim] = reads.heads;
    const int64_t share = heads / kv_heads, row = group.row_start + item.first, at = row * heads + head * share;
    const float scale = 1.4426950408889634 / std::sqrt((double)dim);  // the exponential is base 2
    const Queries queries{q + row * stride + head * share * dim, stride, (int)item.num, (int)share, (int)dim, scale};
    const Answers own{out + at * dim, lse ? lse + at : nullptr, heads};
    auto run = [&](auto tile) {
      cached(tile, group, item, head, share);
      fresh(tile, group, item, head, share);
      tile.finish(queries, own);
    };
    queries.rows() <= FEW ? run(Narrow<P>(scratch, queries)) : run(Wide<P>(scratch, queries));
  }

  template <class Tile>
  void cached(Tile& tile, const Group& group, const Item& item, int64_t head, int64_t share) const {
    const auto [_, kv_heads, dim] = reads.heads;
    for (int64_t i = 0; i < group.num_segs; i++) {
      const Segment& seg = reads.segments[group.seg_start + i];
      const uint8_t* sees = reads.sees_segment + group.sees_segment + item.first * group.num_segs + i;
      const Shown shown(item.num, share, Tile::ROWS, [&](int t) { return sees[t * group.num_segs]; });
      if (shown.empty()) continue;
      const float *c = seg.base ? reads.cos + seg.base * (dim / 2) : nullptr, *s = reads.sin + seg.base * (dim / 2);
      const int64_t step = row_bytes(dim, seg.dtype);
      const Rows keys{seg.rows(layer * 2, kv_heads, head, dim), step, seg.dtype, c, s};
      const Rows values{seg.rows(layer * 2 + 1, kv_heads, head, dim), step, seg.dtype, nullptr, nullptr};
      for (int64_t j = 0; j < seg.len; j += KEY_TILE) {
        const int num = std::min<int64_t>(KEY_TILE, seg.len - j);
        tile.show(keys.from(j), num, shown.r0, shown.r1);
        shown.each_token([&](int t, int r0, int r1) {
          if (t >= item.num || sees[t * group.num_segs]) return;
          for (int n = 0; n < num; n++)
            for (int r = r0; r < r1; r++) tile.score(n, r) = HIDDEN;
        });
        tile.fold(values.from(j), num, shown.r0, shown.r1);
      }
    }
  }

  template <class Tile>
  void fresh(Tile& tile, const Group& group, const Item& item, int64_t head, int64_t share) const {
    const Key* others = reads.keys + group.key_start;
    const Row* own = reads.rows + group.row_start + item.first;
    const uint8_t* sees = reads.sees_block + group.sees;
    int64_t lo = group.num_keys, hi = 0;
    for (int t = 0; t < item.num; t++) lo = std::min<int64_t>(lo, own[t].first), hi = std::max<int64_t>(hi, own[t].last);
    auto rows = [&](const float* x) {
      const float* first = x + group.key_start * kv_stride + head * reads.heads.dim;
      return Rows{reinterpret_cast<const char*>(first), kv_stride * 4, F32, nullptr, nullptr};
    };
    const Rows keys = rows(k), values = rows(v);
    for (int64_t j = lo; j < hi; j += KEY_TILE) {
      const int num = std::min<int64_t>(KEY_TILE, hi - j);
      const Shown shown(item.num, share, Tile::ROWS, [&](int t) { return own[t].first < j + num && own[t].last > j; });
      if (shown.empty()) continue;
      tile.show(keys.from(j), num, shown.r0, shown.r1);
      shown.each_token([&](int t, int r0, int r1) {
        if (t >= item.num) return;
        for (int n = own[t].dense && own[t].first <= j ? std::max<int64_t>(0, own[t].last - j) : 0; n < num; n++) {
          const Key& key = others[j + n];
          if (key.block == own[t].block ? key.offset <= own[t].offset : sees[own[t].block * group.num_blocks + key.block]) continue;
          for (int r = r0; r < r1; r++) tile.score(n, r) = HIDDEN;
        }
      });
      tile.fold(values.from(j), num, shown.r0, shown.r1);
    }
  }
};

// Called by every thread of a team.
inline void attend(const Attention& attention) {
  const Reads& reads = attention.reads;
  auto run = [&](auto product) {
    Scratch<decltype(product)> scratch(reads.heads.dim);
    const int64_t heads = reads.heads.keys;
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < reads.num_items * heads; i++) attention.compute(reads.items[i / heads], i % heads, scratch);
  };
  reads.bf16 ? run(Bf16{}) : run(Fp32{});
}

}  // namespace
