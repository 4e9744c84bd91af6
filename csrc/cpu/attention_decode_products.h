// The two products of attention_decode: of queries and keys, and of probabilities and values.
//
// Scores are summed with several rows side by side in a vector: lane r * L + l holds row r and, of every L items of a
// head, the l-th. A run of L items of a key, repeated for each row, is one load, and the sums of L keys make one vector
// of scores. Items are floats, or pairs of bfloat16.
#pragma once

#include "attention_decode_walk.h"
#include "buffer.h"
#include "gemm_panel.h"

namespace llmsys::cpu::LLMSYS_ISA {

constexpr int kMaxDim = 256;  // of a head
constexpr int kColumns = 2 * kLanes;

// ---- heads as items ----

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

// kColumns elements as items. Pairs are of neighbours, in any order of blocks.
template <class Items, Order kOrder>
LLMSYS_INLINE void store_items(float* items, Block block) {
  if constexpr (Items::kElements == 1) {
    store(items, block.first);
    store(items + kLanes, block.second);
  } else if constexpr (kOrder == Order::alternate) {
    store(items, paired(block.first, block.second));
  } else {
#if defined(__AVX512BF16__)
    store(items, consecutive_pairs(block.first, block.second));
#endif
  }
}

// A head as items, padded with zeros to whole blocks.
template <class Items, Order kOrder, class T>
LLMSYS_INLINE void pack_head(const T* head, int64_t dim, float* items) {
  for (; dim >= kColumns; dim -= kColumns, head += kColumns, items += kColumns / Items::kElements)
    store_items<Items, kOrder>(items, load_block<kOrder>(head));
  if (dim > 0) store_items<Items, kOrder>(items, load_columns<kOrder>(head, dim));
}

// ---- rows side by side ----

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

// The largest and the sum of each run of kRun lanes, in all of them.
template <int kRun, class Combine>
LLMSYS_INLINE F32 over_runs(F32 x, Combine combine) {
  if constexpr (kRun > 1) {
    x = combine(x, picked(x, x, [](int i) { return i ^ (kRun / 2); }));
    return over_runs<kRun / 2>(x, combine);
  }
  return x;
}

// How kRows rows lie in kPanels vectors, of kElements elements in a lane.
template <int kRows, int kElements>
struct Side {
  static constexpr int kPanels = LLMSYS_AVX512 && kRows >= 4 ? 2 : 1;
  static constexpr int kPanelRows = kRows / kPanels;
  static constexpr int kRun = kLanes / kPanelRows;                   // lanes of a row: keys in a vector of scores
  static constexpr int kKeys = kRun > 8 ? kRun : 8;                  // scored at a time
  static constexpr int kVectors = kBlockKeys / kRun;                 // of a block of keys and a panel
  static constexpr int kStep = kKeys > 2 * kRun ? kKeys : 2 * kRun;  // keys of whole pairs of vectors
  static constexpr int kWeights = kRun / kElements;                  // items of a row in a vector of probabilities

  // Where the items of row r's probabilities are, from those of kWeights items on.
  static constexpr int weights_of(int r) {
    return r / kPanelRows * (kBlockKeys * kPanelRows / kElements) + r % kPanelRows * kWeights;
  }
};

// kKeys rows that are evenly apart, in few registers: an address reaches one or two strides further.
template <int kKeys>
struct Evenly {
  static constexpr int kBases = (kKeys + 2) / 3;
  const char* bases[kBases];
  int64_t stride;

  LLMSYS_INLINE Evenly(const void* first, int64_t stride_bytes) : stride(stride_bytes) {
    for (int i = 0; i < kBases; ++i) bases[i] = static_cast<const char*>(first) + 3 * i * stride;
  }
  LLMSYS_INLINE const float* operator[](int i) const {
    return reinterpret_cast<const float*>(bases[i / 3] + i % 3 * stride);
  }
  LLMSYS_INLINE void advance(int64_t bytes) {
    for (int i = 0; i < kBases; ++i) bases[i] += bytes;
  }
};

// ---- products ----

template <class Items, class C, int kRows>
class Products {
 public:
  using S = Side<kRows, Items::kElements>;
  static constexpr Order kOrder = order_of<C>;

  Products(const Work& args, int64_t heads)
      : args_(args),
        runs_(ceil_div(args.rows, kRows)),
        items_(ceil_div(args.dim, kColumns) * kColumns / Items::kElements),
        in_place_(args.dim % kColumns == 0 && items_ % S::kRun == 0 && sizeof(C) * Items::kElements == 4) {
    static thread_local Buffer queries;
    queries_ = queries.at_least(heads * runs_ * items_ * kRows);
  }

  // The `count` queries of one run.
  void take_queries(int64_t head, int64_t run, const float (*rows)[kMaxDim], int64_t count) {
    float* queries = queries_ + (head * runs_ + run) * items_ * kRows;
    memset(queries, 0, items_ * kRows * sizeof(float));
    alignas(64) float items[kMaxDim];
    for (int64_t r = 0; r < count; ++r) {
      pack_head<Items, kOrder>(rows[r], args_.dim, items);
      for (int64_t at = 0; at < items_; at += S::kRun)
        memcpy(queries + at * kRows + r * S::kRun, items + at, S::kRun * sizeof(float));
    }
  }

  // Products of the queries and `num_keys` keys.
  LLMSYS_INLINE void score(const KeyBlock<C>& block, int64_t head, int64_t run, int num_keys,
                           F32 (*scores)[S::kVectors], Ahead& ahead) {
    const float* queries = queries_ + (head * runs_ + run) * items_ * kRows;
    for (int key = 0; key < num_keys; key += S::kKeys) {
      const C* rows = block.k[key] + head * args_.k_head_stride;
      const Lines lines = run == 0 ? ahead.take(items_ / S::kRun * kKeyLines) : none(block);
      F32 found[S::kPanels][S::kVectors];
      if (in_place_ && block.evenly[key] >= S::kKeys) {
        multiply({rows, args_.k_token_stride * int64_t(sizeof(C))}, queries, lines, found);
      } else {
        for (int i = 0; i < S::kKeys; ++i)
          pack_head<Items, kOrder>(block.k[key + i] + head * args_.k_head_stride, args_.dim, keys_ + i * items_);
        multiply({keys_, items_ * int64_t(sizeof(float))}, queries, lines, found);
      }
      for (int p = 0; p < S::kPanels; ++p)
        for (int i = 0; i < S::kKeys / S::kRun; ++i) scores[p][key / S::kRun + i] = found[p][i];
    }
  }

  // The probabilities of a panel's rows, times the scales of values.
  LLMSYS_INLINE void take_weights(int p, int vectors, const F32* weights) {
    float* items = weights_ + p * kBlockKeys * S::kPanelRows / Items::kElements;
    for (int i = 0; i < vectors; i += 2)
      if constexpr (Items::kElements == 2)
        store_pair<false>(reinterpret_cast<bfloat16*>(items) + i * kLanes, weights[i], weights[i + 1]);
      else
        store_pair<false>(items + i * kLanes, weights[i], weights[i + 1]);
  }

  // sums = sums * factors + probabilities times values, for `rows` rows args.columns apart.
  LLMSYS_INLINE void add_values(const KeyBlock<C>& block, int64_t head, int64_t run, int num_keys, int64_t rows,
                                const float* factors, float* sums, Ahead& ahead) const {
    const int items = num_keys / Items::kElements;
    for (int64_t column = 0; column < args_.columns; column += kColumns) {
      const Lines lines = run == 0 ? ahead.take(items * kValueLines) : none(block);
      const int64_t at = head * args_.v_head_stride + column;
      Block found[kRows];
      if (column + kColumns <= args_.value_dim)
        weigh<true>(block.v, at, kColumns, items, lines, found);
      else
        weigh<false>(block.v, at, args_.value_dim - column, items, lines, found);
      float* sum = sums + column;
      for (int r = 0; r < rows; ++r, sum += args_.columns) {
        store(sum, multiply_add(load(sum), factors[r], found[r].first));
        store(sum + kLanes, multiply_add(load(sum + kLanes), factors[r], found[r].second));
      }
    }
  }

 private:
  static constexpr int64_t kChain = Items::kElements > 1 ? 32 : 8;
  // Lines of the next block for each step of a product.
  static constexpr int kItemBytes = Items::kElements * int(sizeof(C));
  static constexpr int kKeyLines = S::kKeys * S::kRun * kItemBytes / 64 > 0 ? S::kKeys * S::kRun * kItemBytes / 64 : 1;
  static constexpr int kValueLines = kColumns * kItemBytes / 64 > 0 ? kColumns * kItemBytes / 64 : 1;

  // A line that is near already, again and again.
  static Lines none(const KeyBlock<C>& block) { return {reinterpret_cast<const char*>(&block), 0}; }

  // `queries` has kPanels vectors for each run of items. A lane adds kChain products before its sum goes to the
  // others': long chains of roundings cost digits, see gemm.cpp.
  LLMSYS_INLINE void multiply(Evenly<S::kKeys> keys, const float* queries, Lines lines,
                              F32 (*scores)[S::kVectors]) const {
    for (int64_t at = 0; at < items_; at += kChain * S::kRun) {
      F32 sums[S::kPanels][S::kKeys];
      for (int p = 0; p < S::kPanels; ++p)
        for (int i = 0; i < S::kKeys; ++i) sums[p][i] = F32{};
      for (int64_t left = smaller(items_ - at, kChain * S::kRun); left > 0; left -= S::kRun) {
        F32 query[S::kPanels];
        for (int p = 0; p < S::kPanels; ++p) query[p] = load(queries + p * kLanes);
#pragma GCC unroll 16
        for (int i = 0; i < S::kKeys; ++i) {
          if (i % (S::kKeys / kKeyLines) == 0) lines.ask();
          const F32 key = repeated<S::kRun>(keys[i]);
          for (int p = 0; p < S::kPanels; ++p) sums[p][i] = Items::add_product(sums[p][i], query[p], key);
        }
        queries += S::kPanels * kLanes;
        keys.advance(S::kRun * int64_t(sizeof(float)));
      }
      for (int p = 0; p < S::kPanels; ++p)
        for (int i = 0; i < S::kKeys; i += S::kRun) {
          const F32 found = summed_runs<S::kRun>(sums[p] + i);
          scores[p][i / S::kRun] = at == 0 ? found : scores[p][i / S::kRun] + found;
        }
    }
  }

  // kColumns columns of the values of an item's keys.
  template <bool kWhole>
  LLMSYS_INLINE static Block values(const C* const* rows, int64_t at, int64_t count) {
    if constexpr (Items::kElements == 1) {
      return kWhole ? load_block<kOrder>(rows[0] + at) : load_columns<kOrder>(rows[0] + at, count);
    } else if constexpr (kWhole && __is_same(C, bfloat16)) {
      U32 a, b;
      memcpy(&a, rows[0] + at, sizeof a);
      memcpy(&b, rows[1] + at, sizeof b);
      return {as_f32((a & 0xffffu) | b << 16), as_f32(a >> 16 | (b & 0xffff0000u))};
    } else {
      const Block a = load_columns<kOrder>(rows[0] + at, count), b = load_columns<kOrder>(rows[1] + at, count);
      return {paired(a.first, b.first), paired(a.second, b.second)};
    }
  }

  template <bool kWhole>
  LLMSYS_INLINE void weigh(const C* const* rows, int64_t at, int64_t count, int items, Lines lines,
                           Block (&sums)[kRows]) const {
    F32 first[kRows], second[kRows];
    for (int r = 0; r < kRows; ++r) first[r] = second[r] = F32{};
    const float* weights = weights_;
    for (int start = 0; start < items; start += S::kWeights, weights += S::kWeights * S::kPanelRows) {
#pragma GCC unroll 2
      for (int i = 0; i < S::kWeights; ++i, rows += Items::kElements) {
        const Block v = values<kWhole>(rows, at, count);
        for (int line = 0; line < kValueLines; ++line) lines.ask();
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          const F32 p = Items::repeated(weights + S::weights_of(r) + i);
          first[r] = Items::add_product(first[r], p, v.first);
          second[r] = Items::add_product(second[r], p, v.second);
        }
      }
    }
    for (int r = 0; r < kRows; ++r) sums[r] = {first[r], second[r]};
  }

  const Work& args_;
  const int64_t runs_, items_;
  const bool in_place_;
  float* queries_;
  alignas(64) float weights_[kBlockKeys * kRows];
  alignas(64) float keys_[S::kKeys * kMaxDim];
};

}  // namespace llmsys::cpu::LLMSYS_ISA
