// A unit of work is a split of one sequence's keys, with some of the key heads: it goes through the keys once, block by
// block, whose heads are neighbours in memory, and the query rows of a head share each read of k and v. Units leave the
// sum of e^(z - m) v, m and the sum of e^(z - m) of each row behind; then they are merged.
//
// Scores are summed with several rows side by side in a vector: lane r * L + l holds row r and, of every L items of a
// head, the l-th. A run of L items of a key, repeated for each row, is one load, and the sums of L keys make one vector
// of scores.
//
// Long because the walk over the cache, the two products and the softmax between them share one block of keys.
#include "../attention_decode.h"

#include <utility>

#include "../numbers.h"
#include "buffer.h"
#include "dispatch.h"
#include "functions.h"
#include "gemm_panel.h"
#include "parallel.h"

namespace llmsys::cpu::LLMSYS_ISA {
namespace {

constexpr int64_t kSplitKeys = 256;                // the same whatever the number of threads
constexpr int64_t kKeptFloats = int64_t(1) << 22;  // of parts, from call to call
constexpr int kBlockKeys = 64;                     // keys between two looks at the largest score
constexpr int kMaxDim = 256;                       // of a head
constexpr int kColumns = 2 * kLanes;
constexpr int kMaxRows = kLanes / 2 < 8 ? kLanes / 2 : 8;  // that are scored side by side

// What units leave behind: of each sequence, key head and split, for the rows of the head m, the sums, and the values.
struct Work : AttentionDecode {
  float* parts;
  int64_t rows, columns, max_splits;  // of a key head; of values, in whole blocks; of a sequence

  int64_t part_floats() const { return rows * (2 + columns); }
  float* part(int64_t b, int64_t head, int64_t split) const {
    return parts + ((b * kv_heads + head) * max_splits + split) * part_floats();
  }
};

// ---- which keys ----

// Of a sequence: how many keys count, and those that some of its queries see.
struct Span {
  int64_t length, first, end;
};

// The keys that query `token` sees.
Span seen_by(const Work& args, int64_t b, int64_t token) {
  const int64_t length = args.cache_seqlens[b], place = length - args.tokens + token;
  const int64_t first = args.window_left < 0 ? 0 : larger(0, place - args.window_left);
  const int64_t end = args.window_right < 0 ? length : smaller(length, place + args.window_right + 1);
  return {length, first, larger(first, end)};
}

// Both ends of what a query sees rise with it.
Span seen_by_all(const Work& args, int64_t b) {
  return {args.cache_seqlens[b], seen_by(args, b, 0).first, seen_by(args, b, args.tokens - 1).end};
}

int64_t first_split(const Span& span) { return span.first / kSplitKeys; }
int64_t end_split(const Span& span) {
  return span.end > span.first ? ceil_div(span.end, kSplitKeys) : first_split(span);
}

// A block of keys for some key heads of a sequence.
struct Step {
  int64_t b, split, head, key;
  Span span;

  int64_t split_begin() const { return larger(span.first, split * kSplitKeys); }
  int64_t split_end() const { return smaller(span.end, (split + 1) * kSplitKeys); }
  int64_t count() const { return smaller(split_end() - key, kBlockKeys); }
  bool last_of_unit() const { return key + kBlockKeys >= split_end(); }
};

// All of them, unit after unit, in the order in which threads take them.
class Walk {
 public:
  explicit Walk(const Work& args) : args_(args), heads_(args.kv_heads) {
    // Fewer heads at a time where threads would go without work. No bit depends on it.
    for (int64_t d = 1; heads_ > 1 && units() < 4 * max_threads(); ++d)
      if (args.kv_heads % d == 0) heads_ = args.kv_heads / d;
  }

  int64_t heads() const { return heads_; }

  int64_t units() const {
    int64_t units = 0;
    for (int64_t b = 0; b < args_.batch; ++b) units += units_of(seen_by_all(args_, b));
    return units;
  }

  Step start(int64_t unit) const {
    Step step = {};
    for (step.span = seen_by_all(args_, 0); unit >= units_of(step.span); step.span = seen_by_all(args_, ++step.b))
      unit -= units_of(step.span);
    const int64_t groups = args_.kv_heads / heads_;
    step.head = unit % groups * heads_;
    step.split = first_split(step.span) + unit / groups;
    step.key = step.split_begin();
    return step;
  }

  // To the next one, which there must be.
  void advance(Step& step) const {
    if (!step.last_of_unit()) {
      step.key += kBlockKeys;
      return;
    }
    step.head += heads_;
    if (step.head == args_.kv_heads) {
      step.head = 0;
      if (++step.split == end_split(step.span)) {
        do step.span = seen_by_all(args_, ++step.b);
        while (units_of(step.span) == 0);
        step.split = first_split(step.span);
      }
    }
    step.key = step.split_begin();
  }

 private:
  int64_t units_of(const Span& span) const { return (end_split(span) - first_split(span)) * (args_.kv_heads / heads_); }

  const Work& args_;
  int64_t heads_;
};

// ---- where they are ----

// The rows of the first head of a block of keys, the last one again for those after it.
template <class C>
struct KeyBlock {
  const C* k[kBlockKeys];
  const C* v[kBlockKeys];
  const float* k_scale[kBlockKeys];
  const float* v_scale[kBlockKeys];
  int count = 0;
};

template <class C>
void find(const Work& args, const Step& step, KeyBlock<C>& block) {
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
        block.k_scale[i] = args.k_scale + k_scale + row * args.k_scale_token_stride;
        block.v_scale[i] = args.v_scale + v_scale + row * args.v_scale_token_stride;
      }
    }
  }
  for (int i = block.count, last = i - 1; i < kBlockKeys; ++i) {
    block.k[i] = block.k[last];
    block.v[i] = block.v[last];
    if constexpr (__is_same(C, int8_t)) {
      block.k_scale[i] = block.k_scale[last];
      block.v_scale[i] = block.v_scale[last];
    }
  }
}

// The block after this one, asked of memory in the order in which it lies there, a few cache lines at a time while the
// processor computes, and into the second-level cache: into the first, requests wait for each other, and rows that are
// a power of two apart push each other out (Zen 4, bfloat16, 8 rows: 96 ns a key without or into the first, 60 into the
// second by heads, 31 like this; asked for in bursts, a fifth slower where a row or four share a key).
template <class C>
class Ahead {
 public:
  Ahead() = default;
  Ahead(const C* const* rows, int64_t heads, int64_t head_stride, int64_t dim, int64_t steps) : rows_(rows) {
    const bool adjacent = head_stride == dim;
    bytes_ = (adjacent ? heads : 1) * dim * int64_t(sizeof(C));
    heads_ = adjacent ? 1 : heads;
    stride_ = head_stride * int64_t(sizeof(C));
    lines_ = ceil_div(kBlockKeys * heads_ * ceil_div(bytes_, 64), steps);
    begin();
  }

  LLMSYS_INLINE void step() {
    for (int64_t line = 0; line < lines_; ++line) {
      prefetch_later(at_);
      at_ += 64;
      if (at_ >= end_) next();
    }
  }

 private:
  void begin() {
    at_ = reinterpret_cast<const char*>(rows_[row_]) + head_ * stride_;
    end_ = at_ + bytes_;
  }
  void next() {
    if (++head_ == heads_) head_ = 0, ++row_;
    if (row_ < kBlockKeys)
      begin();
    else
      lines_ = 0;
  }

  const char *at_ = nullptr, *end_ = nullptr;
  int64_t lines_ = 0, bytes_ = 0, heads_ = 0, stride_ = 0;
  int row_ = 0, head_ = 0;
  const C* const* rows_ = nullptr;
};

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

// How kRows rows are scored: side by side, in kPanels vectors where registers hold that many sums.
template <class Items, int kRows>
struct Scorer {
  static constexpr int kPanels = LLMSYS_AVX512 && kRows >= 4 ? 2 : 1;
  static constexpr int kPanelRows = kRows / kPanels;
  static constexpr int kRun = kLanes / kPanelRows;                   // lanes of a row: keys in a vector of scores
  static constexpr int kKeys = kRun > 8 ? kRun : 8;                  // scored at a time
  static constexpr int kVectors = kBlockKeys / kRun;                 // of a block of keys and a panel
  static constexpr int kStep = kKeys > 2 * kRun ? kKeys : 2 * kRun;  // keys of whole pairs of vectors
  static constexpr int kWeights = kRun / Items::kElements;           // items of probabilities of a row in a vector

  // `queries` has kPanels vectors for each run of items.
  template <class C>
  LLMSYS_INLINE static void score(const float* const* keys, const float* queries, int64_t items,
                                  F32 (*scores)[kVectors], Ahead<C>& ahead) {
    F32 sums[kPanels][kKeys];
    const float* rows[kKeys];
    for (int i = 0; i < kKeys; ++i) {
      rows[i] = keys[i];
      for (int p = 0; p < kPanels; ++p) sums[p][i] = F32{};
    }
    for (int64_t at = 0; at < items; at += kRun, queries += kPanels * kLanes) {
      ahead.step();
      F32 query[kPanels];
      for (int p = 0; p < kPanels; ++p) query[p] = load(queries + p * kLanes);
#pragma GCC unroll 16
      for (int i = 0; i < kKeys; ++i) {
        const F32 key = repeated<kRun>(rows[i] + at);
        for (int p = 0; p < kPanels; ++p) sums[p][i] = Items::add_product(sums[p][i], query[p], key);
      }
    }
    for (int p = 0; p < kPanels; ++p)
      for (int i = 0; i < kKeys; i += kRun) scores[p][i / kRun] = summed_runs<kRun>(sums[p] + i);
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

// What is known of the rows of a panel, in each of their lanes.
struct Panel {
  F32 largest, total;  // so far: the largest score, and the sum of e^(z - largest) in each lane
  I32 first, end;      // keys of the split that the row sees
  I32 place;
  F32 slope;
};

// ---- units of work ----

template <class Items, class C, int kRows>
class Worker {
  using S = Scorer<Items, kRows>;
  static constexpr Order kOrder = order_of<C>;

 public:
  Worker(const Work& args, int64_t heads)
      : args_(args),
        heads_(heads),
        group_(args.heads / args.kv_heads),
        rows_(args.rows),
        runs_(ceil_div(rows_, kRows)),
        items_(padded_items<Items>(args.dim)),
        columns_(args.columns),
        in_place_(packed_already<Items, C>(args.dim) && items_ % S::kRun == 0) {
    static thread_local Buffer panels, queries;
    panels_ = reinterpret_cast<Panel*>(panels.at_least(heads * runs_ * S::kPanels * int64_t(sizeof(Panel) / 4)));
    queries_ = queries.at_least(heads * runs_ * items_ * kRows);
    for (int lane = 0; lane < kLanes; ++lane) key_of_lane_[lane] = lane % S::kRun;
  }

  void begin(const Step& step) {
    first_of_last_ = seen_by(args_, step.b, args_.tokens - 1).first;
    end_of_first_ = smaller(seen_by(args_, step.b, 0).end, step.split_end());
    for (int64_t head = 0; head < heads_; ++head) {
      memset(values_of(step, head), 0, rows_ * columns_ * sizeof(float));
      for (int64_t run = 0; run < runs_; ++run) {
        pack_queries(step, head, run);
        for (int p = 0; p < S::kPanels; ++p)
          panels(head, run)[p] = make_panel(step, head, run * kRows + p * S::kPanelRows);
      }
    }
  }

  void add(const Step& step, const KeyBlock<C>& block, const KeyBlock<C>* next) {
    const int keys = int(ceil_div(block.count, S::kStep)) * S::kStep;
    Ahead<C> ahead_k, ahead_v;
    if (next) {
      const int64_t runs = heads_ * runs_;
      ahead_k = {next->k, heads_, args_.k_head_stride, args_.dim, runs * (kBlockKeys / S::kKeys) * (items_ / S::kRun)};
      ahead_v = {next->v, heads_, args_.v_head_stride, args_.value_dim,
                 runs * (columns_ / kColumns) * (kBlockKeys / Items::kElements)};
    }
    for (int64_t head = 0; head < heads_; ++head) {
      if constexpr (__is_same(C, int8_t))
        for (int i = 0; i < keys; ++i) {
          k_scale_[i] = block.k_scale[i][head * args_.k_scale_head_stride];
          v_scale_[i] = block.v_scale[i][head * args_.v_scale_head_stride];
        }
      for (int64_t run = 0; run < runs_; ++run) {
        F32 scores[S::kPanels][S::kVectors];
        score(block, head, queries_ + (head * runs_ + run) * items_ * kRows, keys, scores, ahead_k);
        for (int p = 0; p < S::kPanels; ++p) {
          finish(step, panels(head, run)[p], keys / S::kRun, scores[p]);
          weigh(panels(head, run)[p], p, keys / S::kRun, scores[p]);
        }
        const int rows = int(smaller(kRows, rows_ - run * kRows));
        float* sums = values_of(step, head) + run * kRows * columns_;
        for (int64_t column = 0; column < columns_; column += kColumns)
          add_values(block, head, keys / Items::kElements, column, rows, sums + column, ahead_v);
      }
    }
  }

  // What merge_row reads of each row besides its values: m, and the sum.
  void end(const Step& step) {
    for (int64_t head = 0; head < heads_; ++head) {
      float* part = part_of(step, head);
      for (int64_t row = 0; row < rows_; ++row) {
        const int64_t in_run = row % kRows;
        const Panel& panel = panels(head, row / kRows)[in_run / S::kPanelRows];
        const int lane = int(in_run % S::kPanelRows) * S::kRun;
        part[row] = panel.largest[lane];
        part[rows_ + row] = over_runs<S::kRun>(panel.total, [](F32 a, F32 b) { return a + b; })[lane];
      }
    }
  }

 private:
  float* part_of(const Step& step, int64_t head) const { return args_.part(step.b, step.head + head, step.split); }
  float* values_of(const Step& step, int64_t head) const { return part_of(step, head) + 2 * rows_; }
  Panel* panels(int64_t head, int64_t run) const { return panels_ + (head * runs_ + run) * S::kPanels; }

  void pack_queries(const Step& step, int64_t head, int64_t run) {
    float* queries = queries_ + (head * runs_ + run) * items_ * kRows;
    memset(queries, 0, items_ * kRows * sizeof(float));
    float items[kMaxDim];
    for (int64_t r = 0; r < smaller(kRows, rows_ - run * kRows); ++r) {
      const int64_t row = run * kRows + r, h = (step.head + head) * group_ + row / args_.tokens;
      with_type(args_.dtype, [&](auto element) {
        const auto* q = static_cast<const decltype(element)*>(args_.q) + step.b * args_.q_batch_stride +
                        row % args_.tokens * args_.q_token_stride + h * args_.q_head_stride;
        pack_head<Items, kOrder>(q, args_.dim, items);
      });
      for (int64_t at = 0; at < items_; at += S::kRun)
        memcpy(queries + at * kRows + r * S::kRun, items + at, S::kRun * sizeof(float));
    }
  }

  // Of the rows from `first` on; beyond the last one there, as that.
  Panel make_panel(const Step& step, int64_t head, int64_t first) const {
    Panel panel = {};
    panel.largest = splat(-kInfinity);
    for (int lane = 0; lane < kLanes; ++lane) {
      const int64_t row = smaller(first + lane / S::kRun, rows_ - 1), token = row % args_.tokens;
      const Span span = seen_by(args_, step.b, token);
      panel.first[lane] = int32_t(span.first);
      panel.end[lane] = int32_t(smaller(span.end, step.split_end()));
      panel.place[lane] = int32_t(span.length - args_.tokens + token);
      const int64_t h = (step.head + head) * group_ + row / args_.tokens;
      if (args_.alibi_slopes) panel.slope[lane] = args_.alibi_slopes[step.b * args_.alibi_stride + h];
    }
    return panel;
  }

  // Products of queries and keys.
  LLMSYS_INLINE void score(const KeyBlock<C>& block, int64_t head, const float* queries, int num_keys,
                           F32 (*scores)[S::kVectors], Ahead<C>& ahead) {
    const int64_t offset = head * args_.k_head_stride;
    for (int key = 0; key < num_keys; key += S::kKeys) {
      const float* keys[S::kKeys];
      for (int i = 0; i < S::kKeys; ++i) {
        const C* row = block.k[key + i] + offset;
        keys[i] = reinterpret_cast<const float*>(row);
        if (in_place_) continue;
        pack_head<Items, kOrder>(row, args_.dim, keys_ + i * items_);
        keys[i] = keys_ + i * items_;
      }
      F32 found[S::kPanels][S::kVectors];
      S::score(keys, queries, items_, found, ahead);
      for (int p = 0; p < S::kPanels; ++p)
        for (int i = 0; i < S::kKeys / S::kRun; ++i) scores[p][key / S::kRun + i] = found[p][i];
    }
  }

  // From products to what the softmax is of.
  LLMSYS_INLINE void finish(const Step& step, const Panel& panel, int vectors, F32* scores) {
    const bool all_seen = step.key >= first_of_last_ && step.key + vectors * S::kRun <= end_of_first_;
    for (int i = 0; i < vectors; ++i) {
      F32 z = scores[i] * args_.scale;
      if constexpr (__is_same(C, int8_t)) z = z * repeated<S::kRun>(k_scale_ + i * S::kRun);
      if (args_.softcap) z = args_.softcap * tanh(z / args_.softcap);
      const I32 key = key_of_lane_ + int32_t(step.key + i * S::kRun);
      if (args_.alibi_slopes) {
        const F32 distance = __builtin_convertvector(panel.place - key, F32);
        z = z - panel.slope * max(distance, -distance);
      }
      if (!all_seen) z = select((key >= panel.first) & (key < panel.end), z, splat(-kInfinity));
      scores[i] = z;
    }
  }

  // From scores to probabilities, as items, and what the sums from before are multiplied with.
  LLMSYS_INLINE void weigh(Panel& panel, int p, int vectors, const F32* scores) {
    F32 largest = panel.largest;
    for (int i = 0; i < vectors; ++i) largest = max(scores[i], largest);
    largest = over_runs<S::kRun>(largest, [](F32 a, F32 b) { return max(a, b); });
    const F32 shift = finite_or_zero(largest), factor = exp(panel.largest - shift);
    F32 total = panel.total * factor;
    float* weights = weights_ + p * kBlockKeys * S::kPanelRows / Items::kElements;
    for (int i = 0; i < vectors; i += 2) {
      Block weight = exp(Block{scores[i] - shift, scores[i + 1] - shift});
      total = total + (weight.first + weight.second);
      if constexpr (__is_same(C, int8_t)) {
        weight.first = weight.first * repeated<S::kRun>(v_scale_ + i * S::kRun);
        weight.second = weight.second * repeated<S::kRun>(v_scale_ + (i + 1) * S::kRun);
      }
      if constexpr (Items::kElements == 2)
        store_pair<false>(reinterpret_cast<bfloat16*>(weights) + i * kLanes, weight.first, weight.second);
      else
        store_pair<false>(weights + i * kLanes, weight.first, weight.second);
    }
    panel.total = total, panel.largest = largest;
    for (int r = 0; r < S::kPanelRows; ++r) factors_[p * S::kPanelRows + r] = factor[r * S::kRun];
  }

  // kColumns columns of the values of an item's keys.
  LLMSYS_INLINE static Block values(const C* const* rows, int item, int64_t column, int64_t left) {
    if constexpr (Items::kElements == 2) {
      const Block a = load_columns<kOrder>(rows[2 * item] + column, left);
      const Block b = load_columns<kOrder>(rows[2 * item + 1] + column, left);
      return {paired(a.first, b.first), paired(a.second, b.second)};
    } else {
      return load_columns<kOrder>(rows[item] + column, left);
    }
  }

  // Probabilities times values, of kColumns columns.
  LLMSYS_INLINE void add_values(const KeyBlock<C>& block, int64_t head, int items, int64_t column, int rows,
                                float* sums, Ahead<C>& ahead) {
    constexpr int kPanelWeights = kBlockKeys * S::kPanelRows / Items::kElements;
    F32 first[kRows], second[kRows];
    for (int r = 0; r < kRows; ++r) first[r] = second[r] = F32{};
    const int64_t at = head * args_.v_head_stride + column;
    const auto sum = [&](int64_t left) {
      for (int start = 0; start < items; start += S::kWeights) {
        const float* weights = weights_ + start * S::kPanelRows;
#pragma GCC unroll 2
        for (int i = 0; i < S::kWeights; ++i) {
          const Block v = values(block.v, start + i, at, left);
          ahead.step();
#pragma GCC unroll 8
          for (int r = 0; r < kRows; ++r) {
            const int place = r / S::kPanelRows * kPanelWeights + r % S::kPanelRows * S::kWeights;
            const F32 p = Items::repeated(weights + place + i);
            first[r] = Items::add_product(first[r], p, v.first);
            second[r] = Items::add_product(second[r], p, v.second);
          }
        }
      }
    };
    if (column + kColumns <= args_.value_dim)
      sum(kColumns);
    else
      sum(args_.value_dim - column);
    for (int r = 0; r < rows; ++r, sums += columns_) {
      store(sums, multiply_add(load(sums), factors_[r], first[r]));
      store(sums + kLanes, multiply_add(load(sums + kLanes), factors_[r], second[r]));
    }
  }

  const Work& args_;
  const int64_t heads_, group_, rows_, runs_, items_, columns_;
  const bool in_place_;
  int64_t first_of_last_ = 0, end_of_first_ = 0;
  Panel* panels_;
  float* queries_;
  I32 key_of_lane_ = {};
  float factors_[kRows];
  float k_scale_[kBlockKeys], v_scale_[kBlockKeys];
  alignas(64) float weights_[kBlockKeys * kRows];
  alignas(64) float keys_[S::kKeys * kMaxDim];
};

template <class Items, class C, int kRows>
void run_units(const Work& args) {
  const Walk walk(args);
  parallel_for(walk.units(), 1, [&](int64_t begin, int64_t end) {
    if (begin == end) return;
    Worker<Items, C, kRows> worker(args, walk.heads());
    KeyBlock<C> blocks[2];
    KeyBlock<C>*block = blocks, *next = blocks + 1;
    Step step = walk.start(begin);
    find(args, step, *block);
    for (int64_t unit = begin; unit < end; ++unit) {
      worker.begin(step);
      for (bool last = false; !last;) {
        last = step.last_of_unit();
        const bool more = !last || unit + 1 < end;
        Step after = step;
        if (more) walk.advance(after), find(args, after, *next);
        worker.add(step, *block, more ? next : nullptr);
        if (last) worker.end(step);
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
void merge_row(const Work& args, int64_t b, int64_t head, int64_t row) {
  const int64_t rows = args.rows, columns = args.columns;
  const int64_t h = head * (args.heads / args.kv_heads) + row / args.tokens, t = row % args.tokens;
  const Span span = seen_by_all(args, b);
  const int64_t first = first_split(span), end = end_split(span);

  float largest = args.sinks ? args.sinks[h] : -kInfinity;
  for (int64_t split = first; split < end; ++split) {
    const float m = args.part(b, head, split)[row];
    largest = m > largest ? m : largest;
  }
  const float shift = finite_or_zero(splat(largest))[0];
  double total = args.sinks ? exp(splat(args.sinks[h] - shift))[0] : 0.0f;
  for (int64_t split = first; split < end; ++split) {
    float* part = args.part(b, head, split);
    part[row] = exp(splat(part[row] - shift))[0];  // the weight, in the place of m
    total += double(part[row]) * part[rows + row];
  }
  args.lse[(b * args.heads + h) * args.tokens + t] = float(shift + __builtin_log(total));
  const float inverse = total == 0.0 ? 0.0f : float(1.0 / total);

  with_type(args.dtype, [&](auto element) {
    auto* y = static_cast<decltype(element)*>(args.y) + ((b * args.tokens + t) * args.heads + h) * args.value_dim;
    for (int64_t column = 0; column < args.value_dim; column += kColumns) {
      Block sum = {};
      for (int64_t split = first; split < end; ++split) {
        const float* part = args.part(b, head, split);
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
void run(const Work& args) {
  if (args.rows > 4 && kMaxRows >= 8)
    run_units<Items, C, kMaxRows>(args);
  else if (args.rows > 2 && kMaxRows >= 4)
    run_units<Items, C, (kMaxRows < 4 ? kMaxRows : 4)>(args);
  else if (args.rows > 1)
    run_units<Items, C, 2>(args);
  else
    run_units<Items, C, 1>(args);
  const int64_t all = args.batch * args.kv_heads * args.rows;
  parallel_for(all, grain_of(args.max_splits * args.columns * 4), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      merge_row<order_of<C>>(args, i / args.rows / args.kv_heads, i / args.rows % args.kv_heads, i % args.rows);
  });
}

void run(const Work& args) {
#if defined(__AVX512BF16__)
  if (args.dtype == DType::bfloat16) return args.int8 ? run<Pairs, int8_t>(args) : run<Pairs, bfloat16>(args);
#endif
  if (args.int8) return run<Singles, int8_t>(args);
  with_type(args.dtype, [&](auto element) { run<Singles, decltype(element)>(args); });
}

}  // namespace

void attention_decode(const AttentionDecode& given) {
  static thread_local Buffer parts;
  Work args = {given, nullptr, given.tokens * (given.heads / given.kv_heads),
               ceil_div(given.value_dim, kColumns) * kColumns, 0};
  if (args.batch == 0 || args.tokens == 0) return;
  for (int64_t b = 0; b < args.batch; ++b)
    args.max_splits = larger(args.max_splits, ceil_div(args.cache_seqlens[b], kSplitKeys));
  args.parts = parts.at_least(args.batch * args.kv_heads * args.max_splits * args.part_floats());
  run(args);
  parts.keep_at_most(kKeptFloats);
}

}  // namespace llmsys::cpu::LLMSYS_ISA

LLMSYS_DISPATCH(attention_decode, AttentionDecode)
