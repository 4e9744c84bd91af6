// What both directions of attention share: packed operands, products of tiles, and what happens to scores.
//
// Queries are taken kTileRows at a time and keys in panels of kTileCols, of which kBlockKeys make a block: the register
// tile of gemm_panel.h, whose items (floats, or pairs of bfloat16) these are.
#pragma once

#include "../attention.h"
#include "../numbers.h"
#include "functions.h"
#include "gemm_panel.h"
#include "parallel.h"
#include "philox.h"

namespace llmsys::cpu::LLMSYS_ISA {

// Keys of a block, and queries of one in the backward: whole tiles both ways, for scores in the nearest cache.
#if LLMSYS_AVX512
constexpr int64_t kBlockKeys = 224, kBlockRows = 112;
#else
constexpr int64_t kBlockKeys = 192, kBlockRows = 96;
#endif
static_assert(kBlockKeys % kTileCols == 0 && kBlockKeys % kTileRows == 0 && kBlockRows % kTileRows == 0);

// Items of a block's keys, and how far apart rows of them are kept: not a power of two, for the cache's sets.
template <class Items>
constexpr int64_t kKeyItems = kBlockKeys / Items::kElements;
template <class Items>
constexpr int kKeyRow = int(kKeyItems<Items>) + 16;

// ---- products ----

// Sums leave the registers after this many items, see gemm.cpp.
template <class Items>
#if defined(__FMA__) || LLMSYS_AVX512
constexpr int64_t kRun = Items::kElements > 1 ? 64 : 32;
#else
constexpr int64_t kRun = 8;
#endif

// tile = A B, or tile + A B if `add`: kTileRows x kTileCols. Item i of A's row r is a[r * kRowStride + i *
// kItemStride]; B is a panel.
template <class Items, int kRowStride, int kItemStride>
void multiply_tile(int64_t items, const float* a, const float* b, float* tile, int64_t tile_stride, bool add) {
  F32 sum[kTileRows][kTileVectors];
  do {
    clear(sum);
    int64_t left = smaller(items, kRun<Items>);
    items -= left;
    for (; left >= 8; left -= 8, a += 8 * kItemStride, b += 8 * kTileCols) {
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) multiply_once<Items, kRowStride>(a + i * kItemStride, b + i * kTileCols, sum);
    }
    for (; left > 0; --left, a += kItemStride, b += kTileCols) multiply_once<Items, kRowStride>(a, b, sum);
    put(sum, tile, add, tile_stride);
    add = true;
  } while (items > 0);
}

// ---- packed operands ----

// Of (tokens, columns): where a sequence of one head lies.
struct Rows {
  const char* data;
  DType dtype;
  int64_t stride, tokens, columns;
};

inline Rows rows_of(const void* data, DType dtype, int64_t offset, int64_t stride, int64_t tokens, int64_t columns) {
  return {static_cast<const char*>(data) + offset * (dtype == DType::float32 ? 4 : 2), dtype, stride, tokens, columns};
}
inline Rows query_rows(const Attention& args, int64_t b, int64_t h) {
  return rows_of(args.q, args.dtype, b * args.q_batch_stride + h * args.q_head_stride, args.q_row_stride, args.queries,
                 args.dim);
}
inline Rows key_rows(const Attention& args, int64_t b, int64_t kv_head) {
  return rows_of(args.k, args.dtype, b * args.k_batch_stride + kv_head * args.k_head_stride, args.k_row_stride,
                 args.keys, args.dim);
}
inline Rows value_rows(const Attention& args, int64_t b, int64_t kv_head) {
  return rows_of(args.v, args.dtype, b * args.v_batch_stride + kv_head * args.v_head_stride, args.v_row_stride,
                 args.keys, args.value_dim);
}

// A tile of A: kTileRows tokens from `token` on, summed over columns. kPanelSlack more floats are written.
template <class Items>
void pack_left(const Rows& x, int64_t token, float* tile) {
  Items::template pack<kTileRows>({x.data, x.dtype, x.stride, 1}, x.tokens, token, 0, x.columns, tile);
}

// Panels of B for the tokens of [begin, end), summed over columns: one for each kTileCols tokens.
template <class Items>
void pack_across(const Rows& x, int64_t begin, int64_t end, float* panels) {
  const int64_t panel = ceil_div(x.columns, Items::kElements) * kTileCols;
  for (int64_t token = begin; token < end; token += kTileCols, panels += panel)
    Items::template pack<kTileCols>({x.data, x.dtype, x.stride, 1}, x.tokens, token, 0, x.columns, panels);
}

// Panels of B summed over the tokens of [begin, end): one for each kTileCols columns, `panel` floats apart.
template <class Items>
void pack_along(const Rows& x, int64_t begin, int64_t end, float* panels, int64_t panel) {
  for (int64_t column = 0; column < x.columns; column += kTileCols, panels += panel)
    Items::template pack<kTileCols>({x.data, x.dtype, 1, x.stride}, x.columns, column, begin, end - begin, panels);
}

// ---- scores ----

// A run of consecutive keys; none where end <= begin.
struct Run {
  int64_t begin, end;
};

// The queries [begin, end) of one head: what they may see.
struct Queries {
  const Attention& args;
  int64_t b, h, begin, end;

  const int32_t* first() const { return args.rows; }
  const int32_t* stop() const { return args.rows + args.queries; }
  const int32_t* place() const { return args.rows + 2 * args.queries; }
  const int32_t* sequence() const { return args.rows + 3 * args.queries; }

  // Whole panels that hold every key that one of them sees.
  Run keys() const { return {first()[begin] / kTileCols * kTileCols, round_up(stop()[end - 1], kTileCols)}; }
  bool all_see(Run run) const { return first()[end - 1] <= run.begin && stop()[begin] >= run.end; }

  // The end of what they see of a run that ends with whole panels.
  int64_t last_key(Run run) const { return smaller(run.end, stop()[end - 1]); }

  // Whether the block mask lets one of them see one of these keys.
  bool let_through(Run run) const {
    if (!args.block_mask) return true;
    const int64_t size = args.block_size, across = ceil_div(args.keys, size);
    const int64_t last = smaller(run.end, args.keys) - 1;
    for (int64_t t = begin / size; t <= (end - 1) / size; ++t)
      for (int64_t s = run.begin / size; s <= last / size; ++s)
        if (mask()[t * across + s]) return true;
    return false;
  }
  const uint8_t* mask() const { return args.block_mask + b * args.mask_batch_stride + h * args.mask_head_stride; }
};

// Whether a score is more than scale * q.k with a scale above 0.
inline bool changes_scores(const Attention& args) {
  return args.softcap != 0 || args.bias || args.alibi_slopes || args.block_mask || !(args.scale > 0);
}

LLMSYS_INLINE I32 lane_numbers() {
  I32 lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  return lane;
}

// The scores of query t, where it sees the key; -infinity elsewhere. `z` is of the keys from s on.
LLMSYS_INLINE F32 seen_alone(const Queries& queries, int64_t t, int64_t s, F32 z) {
  const I32 key = lane_numbers() + int32_t(s);
  return select((key >= queries.first()[t]) & (key < queries.stop()[t]), z, splat(-kInfinity));
}

template <class T>
void add_bias(const Queries& queries, int64_t t, Run run, float* z) {
  const Attention& args = queries.args;
  const T* bias = static_cast<const T*>(args.bias) + queries.b * args.bias_batch_stride +
                  queries.h * args.bias_head_stride + t * args.bias_row_stride;
  for (int64_t s = run.begin; s < run.end && s < args.keys; s += kLanes, z += kLanes)
    store(z, load(z) + load_some(bias + s, int(smaller(kLanes, args.keys - s))));
}

// Products q.k of query t made into its scores, but for what it does not see by `rows`; and, if it is not null, the
// slope of the softcap. Apart, as it is seldom called.
static __attribute__((noinline)) void change_scores(const Queries& queries, int64_t t, Run run, float* z,
                                                    float* slope) {
  const Attention& args = queries.args;
  const int64_t size = run.end - run.begin;
  for (int64_t i = 0; i < size; i += kLanes) {
    F32 x = load(z + i) * args.scale;
    if (args.softcap != 0) {
      const F32 capped = tanh(x / args.softcap);
      x = capped * args.softcap;
      if (slope) store(slope + i, 1.0f - capped * capped);
    }
    store(z + i, x);
  }
  if (args.alibi_slopes) {
    const float alibi = args.alibi_slopes[(queries.b + queries.sequence()[t]) * args.heads + queries.h];
    for (int64_t i = 0; i < size; i += kLanes) {
      const I32 distance = lane_numbers() + int32_t(run.begin + i - queries.place()[t]);
      const F32 x = __builtin_convertvector(distance < 0 ? -distance : distance, F32);
      store(z + i, load(z + i) - x * alibi);
    }
  }
  if (args.bias) with_type(args.bias_dtype, [&](auto element) { add_bias<decltype(element)>(queries, t, run, z); });
  if (args.block_mask) {
    const uint8_t* mask = queries.mask() + t / args.block_size * ceil_div(args.keys, args.block_size);
    for (int64_t s = run.begin; s < run.end && s < args.keys;) {
      const int64_t end = smaller(smaller(run.end, args.keys), (s / args.block_size + 1) * args.block_size);
      if (mask[s / args.block_size])
        s = end;
      else
        for (; s < end; ++s) z[s - run.begin] = -kInfinity;
    }
  }
}

// What the probabilities of query t are multiplied by, for 2 * kLanes keys from s on.
LLMSYS_INLINE Block kept(const Queries& queries, const PhiloxKeys& keys, int64_t t, int64_t s) {
  const Attention& args = queries.args;
  const uint64_t row = uint64_t((queries.b * args.heads + queries.h) * args.queries + t);
  const Words words = philox(keys, row * uint64_t(ceil_div(args.keys, 4)) + uint64_t(s / 4));
  const U32 threshold = splat(args.threshold);
  const F32 scale = splat(args.kept_scale);
  return {select(words.low >= threshold, scale, F32{}), select(words.high >= threshold, scale, F32{})};
}

// Calls body(begin, end) for the runs of panels in `run` that `queries` may see, kBlockKeys at most at a time, none
// across a block's border.
template <class Body>
LLMSYS_INLINE void for_each_run(const Queries& queries, Run run, Body body) {
  for (int64_t s = run.begin; s < run.end;) {
    int64_t end = smaller(run.end, (s / kBlockKeys + 1) * kBlockKeys);
    if (queries.args.block_mask) {
      while (s < end && !queries.let_through({s, s + kTileCols})) s += kTileCols;
      int64_t through = s;
      while (through < end && queries.let_through({through, through + kTileCols})) through += kTileCols;
      end = through;
      if (s >= end) continue;
    }
    body(Run{s, end});
    s = end;
  }
}

// ---- probabilities as the left operand of a product ----

// Of one row: the keys from `at` on, kLanes of `low` and then of `high`. Rows are kKeyRow apart.
template <class Items>
LLMSYS_INLINE void store_along_keys(float* row, int64_t at, F32 low, F32 high) {
#if defined(__AVX512BF16__)
  if constexpr (Items::kElements == 2) return store(row + at / 2, consecutive_pairs(low, high));
#endif
  store(row + at, low);
  store(row + at + kLanes, high);
}

// Of two rows, for products that sum over rows: kLanes keys. Items of one key are kBlockKeys apart.
template <class Items>
LLMSYS_INLINE void store_along_rows(float* rows, int64_t at, F32 even, F32 odd) {
#if defined(__AVX512BF16__)
  if constexpr (Items::kElements == 2) return store(rows + at, pairs_of(even, odd));
#endif
  store(rows + at, even);
  store(rows + kBlockKeys + at, odd);
}

// Calls visit(Items{}) with the items that multiply the inputs fastest.
template <class Visit>
void with_items(DType dtype, Visit visit) {
#if defined(__AVX512BF16__)
  if (dtype == DType::bfloat16) return visit(Pairs{});
#endif
  (void)dtype;
  visit(Singles{});
}

}  // namespace llmsys::cpu::LLMSYS_ISA
