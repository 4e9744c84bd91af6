// An item of work is a split of one sequence's keys and one key head, whose query rows share each read of k and v. The
// items leave the sum of e^(z - m) v, m and the sum of e^(z - m) of each row behind; then they are merged.
//
// Scores are summed with several rows side by side in a vector: lane r * L + l holds row r and, of every L items of a
// head, the l-th. A run of L items of a key, repeated for each row, is one load, and the sums of L keys make one vector
// of scores with as many additions as shuffles can feed.
#include "../attention_decode.h"

#include <utility>

#include "dispatch.h"
#include "functions.h"
#include "gemm_panel.h"
#include "parallel.h"

namespace llmsys::cpu::LLMSYS_ISA {
namespace {

constexpr int kBlockKeys = 64;  // keys between two looks at the largest score
constexpr int kMaxDim = 256;    // of a head
constexpr int kColumns = 2 * kLanes;
constexpr int kMaxRows = kLanes / 2 < 8 ? kLanes / 2 : 8;  // that are scored side by side
constexpr float kInfinity = __builtin_inff();

LLMSYS_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
LLMSYS_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ---- which keys ----

// Of a sequence: how many keys count, and those that some of its queries see.
struct Span {
  int64_t length, first, end;
};

// The keys that query `token` sees.
Span seen_by(const AttentionDecode& args, int64_t b, int64_t token) {
  const int64_t length = args.cache_seqlens[b], place = length - args.tokens + token;
  const int64_t first = args.window_left < 0 ? 0 : larger(0, place - args.window_left);
  const int64_t end = args.window_right < 0 ? length : smaller(length, place + args.window_right + 1);
  return {length, first, larger(first, end)};
}

// Both ends of what a query sees rise with it.
Span seen_by_all(const AttentionDecode& args, int64_t b) {
  return {args.cache_seqlens[b], seen_by(args, b, 0).first, seen_by(args, b, args.tokens - 1).end};
}

int64_t first_split(const Span& span) { return span.first / kSplitKeys; }
int64_t end_split(const Span& span) {
  return span.end > span.first ? ceil_div(span.end, kSplitKeys) : first_split(span);
}

// A block of keys of a run of rows that are scored side by side, which is the unit of work of a thread.
struct Step {
  int64_t b, split, head, row, key;
  Span span;

  int64_t split_begin() const { return larger(span.first, split * kSplitKeys); }
  int64_t split_end() const { return smaller(span.end, (split + 1) * kSplitKeys); }
  int64_t count() const { return smaller(split_end() - key, kBlockKeys); }
  bool last_of_rows() const { return key + kBlockKeys >= split_end(); }
};

// All of them in the order in which threads take them: of a split one key head after the other, whose keys are
// neighbours in memory, and of a head all its rows.
class Walk {
 public:
  Walk(const AttentionDecode& args, int rows_at_once)
      : args_(args), rows_(args.tokens * (args.heads / args.kv_heads)), rows_at_once_(rows_at_once) {}

  int64_t units() const {
    int64_t units = 0;
    for (int64_t b = 0; b < args_.batch; ++b) units += units_of(seen_by_all(args_, b));
    return units;
  }

  Step start(int64_t unit) const {
    Step step = {};
    for (step.span = seen_by_all(args_, 0); unit >= units_of(step.span); step.span = seen_by_all(args_, ++step.b))
      unit -= units_of(step.span);
    const int64_t runs = ceil_div(rows_, rows_at_once_);
    step.row = unit % runs * rows_at_once_;
    step.head = unit / runs % args_.kv_heads;
    step.split = first_split(step.span) + unit / runs / args_.kv_heads;
    step.key = step.split_begin();
    return step;
  }

  // To the next one, which there must be.
  void advance(Step& step) const {
    if (!step.last_of_rows()) {
      step.key += kBlockKeys;
      return;
    }
    step.row += rows_at_once_;
    if (step.row >= rows_) {
      step.row = 0;
      if (++step.head == args_.kv_heads) {
        step.head = 0;
        if (++step.split == end_split(step.span)) {
          do step.span = seen_by_all(args_, ++step.b);
          while (units_of(step.span) == 0);
          step.split = first_split(step.span);
        }
      }
    }
    step.key = step.split_begin();
  }

 private:
  int64_t units_of(const Span& span) const {
    return (end_split(span) - first_split(span)) * args_.kv_heads * ceil_div(rows_, rows_at_once_);
  }

  const AttentionDecode& args_;
  int64_t rows_;
  int rows_at_once_;
};

// ---- where they are ----

// The rows of a block of keys, the last one again for those after it.
template <class C>
struct KeyBlock {
  const C* k[kBlockKeys];
  const C* v[kBlockKeys];
  float k_scale[kBlockKeys], v_scale[kBlockKeys];
  int count = 0;
};

template <class C>
void find(const AttentionDecode& args, const Step& step, KeyBlock<C>& block) {
  block.count = int(step.count());
  int64_t page = step.key / args.block_size, row = step.key % args.block_size;
  for (int i = 0; i < block.count; page += 1, row = 0) {
    const int64_t at = args.block_table ? args.block_table[step.b * args.table_stride + page] : step.b;
    const C* k = static_cast<const C*>(args.k) + at * args.k_block_stride + step.head * args.k_head_stride;
    const C* v = static_cast<const C*>(args.v) + at * args.v_block_stride + step.head * args.v_head_stride;
    const int64_t k_scale = at * args.k_scale_block_stride + step.head * args.k_scale_head_stride;
    const int64_t v_scale = at * args.v_scale_block_stride + step.head * args.v_scale_head_stride;
    for (; row < args.block_size && i < block.count; ++row, ++i) {
      block.k[i] = k + row * args.k_token_stride;
      block.v[i] = v + row * args.v_token_stride;
      if constexpr (__is_same(C, int8_t)) {
        block.k_scale[i] = args.k_scale[k_scale + row * args.k_scale_token_stride];
        block.v_scale[i] = args.v_scale[v_scale + row * args.v_scale_token_stride];
      }
    }
  }
  for (int i = block.count; i < kBlockKeys; ++i) {
    block.k[i] = block.k[block.count - 1];
    block.v[i] = block.v[block.count - 1];
    if constexpr (__is_same(C, int8_t)) {
      block.k_scale[i] = block.k_scale[block.count - 1];
      block.v_scale[i] = block.v_scale[block.count - 1];
    }
  }
}

template <class C>
LLMSYS_INLINE void prefetch_row(const C* row, int64_t dim) {
  const char* p = reinterpret_cast<const char*>(row);
  for (int64_t at = 0; at < dim * int64_t(sizeof(C)); at += 64) prefetch(p + at);
}

// ---- items: floats, or pairs of bfloat16 ----

// At most two vectors of elements; those from `count` on are zero.
template <Order kOrder, class T>
LLMSYS_INLINE Block load_columns(const T* p, int64_t count) {
  if (count >= kColumns) return load_block<kOrder>(p);
  const F32 low = load(p, int(smaller(count, kLanes)));
  const F32 high = count > kLanes ? load(p + kLanes, int(count - kLanes)) : F32{};
  return kOrder == Order::alternate ? alternated(low, high) : Block{low, high};
}

// Two bfloat16, given as float32, in each lane.
LLMSYS_INLINE F32 paired(F32 low, F32 high) { return as_f32(as_u32(low) >> 16 | as_u32(high)); }

// A head as items, padded with zeros to whole blocks; as many floats as `padded_items`.
template <class Items, Order kOrder, class T>
LLMSYS_INLINE void pack_head(const T* head, int64_t dim, float* items) {
  for (int64_t d = 0; d < dim; d += kColumns) {
    const Block block = load_columns<kOrder>(head + d, dim - d);
    if constexpr (Items::kElements == 2) {
      store(items + d / 2, paired(block.first, block.second));
    } else {
      store(items + d, block.first);
      store(items + d + kLanes, block.second);
    }
  }
}

template <class Items>
int64_t padded_items(int64_t dim) {
  return ceil_div(dim, kColumns) * kColumns / Items::kElements;
}

// Whether a head in the cache is what pack_head would make of it.
template <class Items, class C>
bool packed_already(int64_t dim) {
  const bool same = Items::kElements == 2 ? __is_same(C, bfloat16) : __is_same(C, float);
  return same && dim % kColumns == 0;
}

// ---- scores ----

// kRun floats, again and again.
template <int kRun>
LLMSYS_INLINE F32 repeated(const float* p) {
  if constexpr (kRun == kLanes)
    return load(p);
  else
    return load_repeated<kRun>(p);
}

// Of each run of kRun lanes, the sums of sums[0], sums[1], ..., one after the other.
template <int kRun, int kHalf = kRun / 2>
LLMSYS_INLINE F32 summed_runs(F32* sums) {
  if constexpr (kHalf == 0) return sums[0];
  for (int i = 0; i < kHalf; ++i)
    sums[i] = shuffle<low_runs<kHalf>>(sums[i], sums[i + kHalf]) + shuffle<high_runs<kHalf>>(sums[i], sums[i + kHalf]);
  return summed_runs<kRun, kHalf / 2>(sums);
}

// Scores kRows rows: `queries` holds a vector for each run of items.
template <class Items, int kRows>
struct Scorer {
  static constexpr int kRun = kLanes / kRows;                        // lanes of a row: keys in a vector of scores
  static constexpr int kKeys = kRun > 8 ? kRun : 8;                  // scored at a time
  static constexpr int kVectors = kBlockKeys / kRun;                 // of a block of keys
  static constexpr int kStep = kKeys > 2 * kRun ? kKeys : 2 * kRun;  // whole pairs of vectors
  static_assert(kRun >= 2);

  LLMSYS_INLINE static void score(const float* const* keys, const float* queries, int64_t items, F32* scores) {
    F32 sums[kKeys];
    const float* rows[kKeys];
    for (int i = 0; i < kKeys; ++i) sums[i] = F32{}, rows[i] = keys[i];
    for (int64_t at = 0; at < items; at += kRun, queries += kLanes) {
      const F32 query = load(queries);
#pragma GCC unroll 16
      for (int i = 0; i < kKeys; ++i) sums[i] = Items::add_product(sums[i], query, repeated<kRun>(rows[i] + at));
    }
    for (int i = 0; i < kKeys; i += kRun) scores[i / kRun] = summed_runs<kRun>(sums + i);
  }
};

// The largest and the sum of each run of kRun lanes, in all of them.
template <int kRun, class Combine>
LLMSYS_INLINE F32 over_runs(F32 x, Combine combine) {
  if constexpr (kRun > 1) {
    x = combine(x, picked(x, x, [](int i) { return i ^ (kRun / 2); }));
    return over_runs<kRun / 2>(x, combine);
  }
  return x;
}

// What scores are shifted by: e^infinity, not NaN, is what becomes of an infinite one.
LLMSYS_INLINE F32 finite_or_zero(F32 x) { return select((x < kInfinity) & (x > -kInfinity), x, F32{}); }

// What the lanes of a vector of scores have in common through an item.
struct Lanes {
  I32 key;         // of the lane, after the first one of its vector
  I32 first, end;  // keys of the split that its row sees
  I32 place;
  F32 slope;
};

// ---- rows of one item ----

template <class Items, class C, int kRows>
class Rows {
  using S = Scorer<Items, kRows>;
  static constexpr Order kOrder = order_of<C>;
  static constexpr int kPairs = S::kRun / Items::kElements;  // items of p of one row in a vector

 public:
  Rows(const AttentionDecode& args, const Step& step) : args_(args) {
    group_ = args.heads / args.kv_heads;
    rows_ = int(smaller(kRows, args.tokens * group_ - step.row));
    items_ = padded_items<Items>(args.dim);
    in_place_ = packed_already<Items, C>(args.dim) && items_ % S::kRun == 0;
    columns_ = ceil_div(args.value_dim, kColumns) * kColumns;
    memset(sums_, 0, rows_ * columns_ * sizeof(float));
    largest_ = splat(-kInfinity), total_ = F32{};
    pack_queries(step);
    find_lanes(step);
  }

  void add(const Step& step, const KeyBlock<C>& block, const KeyBlock<C>* next) {
    const int keys = int(ceil_div(block.count, S::kStep)) * S::kStep, vectors = keys / S::kRun;
    F32 scores[S::kVectors];
    for (int key = 0; key < keys; key += S::kKeys) {
      if (next)
        for (int i = key; i < key + S::kKeys; ++i) {
          prefetch_row(next->k[i], args_.dim);
          prefetch_row(next->v[i], args_.value_dim);
        }
      score(block.k + key, scores + key / S::kRun);
    }
    finish(step, block, vectors, scores);
    const F32 correction = weigh(block, vectors, scores);
    for (int r = 0; r < kRows; ++r) factors_[r] = correction[r * S::kRun];
    for (int64_t column = 0; column < columns_; column += kColumns) add_values(block, keys / Items::kElements, column);
  }

  // What merge reads: for each row m, the sum, and the values.
  void leave(const Step& step) {
    const int64_t all = args_.tokens * group_;
    float* part = args_.parts + ((step.b * args_.kv_heads + step.head) * args_.max_splits + step.split) *
                                    attention_decode_part_floats(all, args_.value_dim);
    const F32 total = over_runs<S::kRun>(total_, [](F32 a, F32 b) { return a + b; });
    for (int r = 0; r < rows_; ++r) {
      part[step.row + r] = largest_[r * S::kRun];
      part[all + step.row + r] = total[r * S::kRun];
    }
    float* values = part + 2 * all + step.row * columns_;
    memcpy(values, sums_, rows_ * columns_ * sizeof(float));
  }

 private:
  void pack_queries(const Step& step) {
    memset(queries_, 0, items_ * kRows * sizeof(float));
    float head[kMaxDim + kColumns];
    for (int r = 0; r < rows_; ++r) {
      const int64_t h = step.head * group_ + (step.row + r) / args_.tokens, t = (step.row + r) % args_.tokens;
      with_type(args_.dtype, [&](auto element) {
        const auto* q = static_cast<const decltype(element)*>(args_.q) + step.b * args_.q_batch_stride +
                        t * args_.q_token_stride + h * args_.q_head_stride;
        pack_head<Items, kOrder>(q, args_.dim, head);
      });
      for (int64_t at = 0; at < items_; at += S::kRun)
        memcpy(queries_ + at * kRows + r * S::kRun, head + at, S::kRun * sizeof(float));
    }
  }

  void find_lanes(const Step& step) {
    for (int lane = 0; lane < kLanes; ++lane) {
      const int64_t row = smaller(step.row + lane / S::kRun, step.row + rows_ - 1), token = row % args_.tokens;
      const Span span = seen_by(args_, step.b, token);
      lanes_.key[lane] = lane % S::kRun;
      lanes_.first[lane] = int32_t(span.first);
      lanes_.end[lane] = int32_t(smaller(span.end, step.split_end()));
      lanes_.place[lane] = int32_t(span.length - args_.tokens + token);
      if (args_.alibi_slopes)
        lanes_.slope[lane] = args_.alibi_slopes[step.b * args_.alibi_stride + step.head * group_ + row / args_.tokens];
    }
    first_of_last_ = seen_by(args_, step.b, args_.tokens - 1).first;
    end_of_first_ = smaller(seen_by(args_, step.b, 0).end, step.split_end());
  }

  // Products of queries and S::kKeys keys.
  LLMSYS_INLINE void score(const C* const* rows, F32* scores) {
    const float* keys[S::kKeys];
    if (in_place_) {
      for (int i = 0; i < S::kKeys; ++i) keys[i] = reinterpret_cast<const float*>(rows[i]);
    } else {
      for (int i = 0; i < S::kKeys; ++i) {
        pack_head<Items, kOrder>(rows[i], args_.dim, keys_ + i * items_);
        keys[i] = keys_ + i * items_;
      }
    }
    S::score(keys, queries_, items_, scores);
  }

  // From products to what the softmax is of.
  void finish(const Step& step, const KeyBlock<C>& block, int vectors, F32* scores) {
    const bool all_seen = step.key >= first_of_last_ && step.key + vectors * S::kRun <= end_of_first_;
    for (int i = 0; i < vectors; ++i) {
      F32 z = scores[i] * args_.scale;
      if constexpr (__is_same(C, int8_t)) z = z * repeated<S::kRun>(block.k_scale + i * S::kRun);
      if (args_.softcap) z = args_.softcap * tanh(z / args_.softcap);
      const I32 key = lanes_.key + int32_t(step.key + i * S::kRun);
      if (args_.alibi_slopes) {
        const F32 distance = __builtin_convertvector(lanes_.place - key, F32);
        z = z - lanes_.slope * max(distance, -distance);
      }
      if (!all_seen) z = select((key >= lanes_.first) & (key < lanes_.end), z, splat(-kInfinity));
      scores[i] = z;
    }
  }

  // From scores to probabilities, as items; what sums from before are multiplied with.
  LLMSYS_INLINE F32 weigh(const KeyBlock<C>& block, int vectors, const F32* scores) {
    F32 highest = largest_;
    for (int i = 0; i < vectors; ++i) highest = max(scores[i], highest);
    highest = over_runs<S::kRun>(highest, [](F32 a, F32 b) { return max(a, b); });
    const F32 shift = finite_or_zero(highest);
    const F32 correction = exp(largest_ - shift);
    F32 total = total_ * correction;
    for (int i = 0; i < vectors; i += 2) {
      F32 p = exp(scores[i] - shift), other = exp(scores[i + 1] - shift);
      total = total + (p + other);
      if constexpr (__is_same(C, int8_t)) {
        p = p * repeated<S::kRun>(block.v_scale + i * S::kRun);
        other = other * repeated<S::kRun>(block.v_scale + (i + 1) * S::kRun);
      }
      if constexpr (Items::kElements == 2) {
        store_pair<false>(reinterpret_cast<bfloat16*>(weights_) + i * kLanes, p, other);
      } else {
        store(weights_ + i * kLanes, p);
        store(weights_ + (i + 1) * kLanes, other);
      }
    }
    total_ = total, largest_ = highest;
    return correction;
  }

  LLMSYS_INLINE static Block values_of(const KeyBlock<C>& block, int item, int64_t column, int64_t left) {
    if constexpr (Items::kElements == 2) {
      const Block a = load_columns<kOrder>(block.v[2 * item] + column, left);
      const Block b = load_columns<kOrder>(block.v[2 * item + 1] + column, left);
      return {paired(a.first, b.first), paired(a.second, b.second)};
    } else {
      return load_columns<kOrder>(block.v[item] + column, left);
    }
  }

  // Probabilities times values, of kColumns columns.
  LLMSYS_INLINE void add_values(const KeyBlock<C>& block, int items, int64_t column) {
    F32 first[kRows], second[kRows];
    for (int r = 0; r < kRows; ++r) first[r] = second[r] = F32{};
    const int64_t left = args_.value_dim - column;
    const auto sum = [&](auto values) {
      for (int start = 0; start < items; start += kPairs) {
        const float* weights = weights_ + start * kRows;
#pragma GCC unroll 2
        for (int i = 0; i < kPairs; ++i) {
          const Block v = values(start + i);
#pragma GCC unroll 8
          for (int r = 0; r < kRows; ++r) {
            const F32 p = Items::repeated(weights + r * kPairs + i);
            first[r] = Items::add_product(first[r], p, v.first);
            second[r] = Items::add_product(second[r], p, v.second);
          }
        }
      }
    };
    if (left >= kColumns)
      sum([&](int item) { return values_of(block, item, column, kColumns); });
    else
      sum([&](int item) { return values_of(block, item, column, left); });
    for (int r = 0; r < rows_; ++r) {
      float* to = sums_ + r * columns_ + column;
      store(to, multiply_add(load(to), factors_[r], first[r]));
      store(to + kLanes, multiply_add(load(to + kLanes), factors_[r], second[r]));
    }
  }

  const AttentionDecode& args_;
  int64_t group_, items_, columns_, first_of_last_, end_of_first_;
  int rows_;
  bool in_place_;
  Lanes lanes_ = {};
  F32 largest_, total_;
  float factors_[kRows];
  alignas(64) float queries_[kMaxDim * kRows];
  alignas(64) float weights_[kBlockKeys * kRows];
  alignas(64) float keys_[S::kKeys * kMaxDim];
  alignas(64) float sums_[kRows * kMaxDim];
};

template <class Items, class C, int kRows>
void run_units(const AttentionDecode& args) {
  const Walk walk(args, kRows);
  parallel_for(walk.units(), 1, [&](int64_t begin, int64_t end) {
    if (begin == end) return;
    KeyBlock<C> blocks[2];
    KeyBlock<C>*block = blocks, *next = blocks + 1;
    Step step = walk.start(begin);
    find(args, step, *block);
    for (int64_t unit = begin; unit < end; ++unit) {
      Rows<Items, C, kRows> rows(args, step);
      for (bool last = false; !last;) {
        last = step.last_of_rows();
        const bool more = !last || unit + 1 < end;
        Step after = step;
        if (more) walk.advance(after), find(args, after, *next);
        rows.add(step, *block, more ? next : nullptr);
        if (last) rows.leave(step);
        step = after;
        std::swap(block, next);
      }
    }
  });
}

// ---- the end ----

template <Order kOrder, class T>
LLMSYS_INLINE void store_columns(T* p, Block block, int64_t count) {
  if (count >= kColumns) return store_block<kOrder, false>(p, block);
  if constexpr (kOrder == Order::alternate) block = halved(block);
  store(p, block.first, int(smaller(count, kLanes)));
  if (count > kLanes) store(p + kLanes, block.second, int(count - kLanes));
}

// y and lse of one row of one key head, from all splits.
template <Order kOrder>
void merge_row(const AttentionDecode& args, int64_t b, int64_t head, int64_t row) {
  const int64_t group = args.heads / args.kv_heads, rows = args.tokens * group;
  const int64_t h = head * group + row / args.tokens, t = row % args.tokens;
  const int64_t columns = ceil_div(args.value_dim, kColumns) * kColumns;
  const Span span = seen_by_all(args, b);
  const int64_t first = first_split(span), end = end_split(span);
  const int64_t part_floats = attention_decode_part_floats(rows, args.value_dim);
  float* parts = args.parts + (b * args.kv_heads + head) * args.max_splits * part_floats;

  float largest = args.sinks ? args.sinks[h] : -kInfinity;
  for (int64_t split = first; split < end; ++split) {
    const float m = parts[split * part_floats + row];
    largest = m > largest ? m : largest;
  }
  const float shift = finite_or_zero(splat(largest))[0];
  double total = args.sinks ? exp(splat(args.sinks[h] - shift))[0] : 0.0f;
  for (int64_t split = first; split < end; ++split) {
    float& weight = parts[split * part_floats + row];  // in the place of m
    weight = exp(splat(weight - shift))[0];
    total += double(weight) * parts[split * part_floats + rows + row];
  }
  args.lse[(b * args.heads + h) * args.tokens + t] = float(shift + __builtin_log(total));
  const float inverse = total == 0.0 ? 0.0f : float(1.0 / total);

  with_type(args.dtype, [&](auto element) {
    auto* y = static_cast<decltype(element)*>(args.y) + ((b * args.tokens + t) * args.heads + h) * args.value_dim;
    for (int64_t column = 0; column < args.value_dim; column += kColumns) {
      Block sum = {};
      for (int64_t split = first; split < end; ++split) {
        const float* part = parts + split * part_floats;
        const float w = part[row];
        if (w == 0.0f) continue;
        const float* values = part + 2 * rows + row * columns + column;
        sum = {multiply_add(load(values), w, sum.first), multiply_add(load(values + kLanes), w, sum.second)};
      }
      store_columns<kOrder>(y + column, {sum.first * inverse, sum.second * inverse}, args.value_dim - column);
    }
  });
}

template <class Items, class C>
void run(const AttentionDecode& args) {
  const int64_t rows = args.tokens * (args.heads / args.kv_heads);
  if (rows > 4 && kMaxRows >= 8)
    run_units<Items, C, kMaxRows>(args);
  else if (rows > 2 && kMaxRows >= 4)
    run_units<Items, C, (kMaxRows < 4 ? kMaxRows : 4)>(args);
  else if (rows > 1)
    run_units<Items, C, 2>(args);
  else
    run_units<Items, C, 1>(args);
  const int64_t all = args.batch * args.kv_heads * rows;
  parallel_for(all, grain_of(args.max_splits * args.value_dim * 4), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      merge_row<order_of<C>>(args, i / rows / args.kv_heads, i / rows % args.kv_heads, i % rows);
  });
}

}  // namespace

void attention_decode(const AttentionDecode& args) {
  if (args.batch == 0 || args.tokens == 0) return;
#if defined(__AVX512BF16__)
  if (args.dtype == DType::bfloat16) return args.int8 ? run<Pairs, int8_t>(args) : run<Pairs, bfloat16>(args);
#endif
  if (args.int8) return run<Singles, int8_t>(args);
  with_type(args.dtype, [&](auto element) { run<Singles, decltype(element)>(args); });
}

}  // namespace llmsys::cpu::LLMSYS_ISA

LLMSYS_DISPATCH(attention_decode, AttentionDecode)
