#include "attention_tile.h"
#include "buffer.h"
#include "dispatch.h"

namespace llmsys::cpu::LLMSYS_ISA {
namespace {

// Keys and values of as many heads as this holds are packed at a time, for all threads: memory that stays in a far
// cache, and with the thread. One head alone may need more.
constexpr int64_t kPackedFloats = int64_t(2) << 20;
// Tiles of queries that meet a block of keys one after another, while it is in the cache.
constexpr int64_t kTiles = 4;
constexpr int64_t kLaneRows = round_up(kTileRows, kLanes);

thread_local Buffer packed_by_thread, sums_by_thread;

// The rows of a tile, of which each lane of a vector is one, from a vector of each row.
template <class Combine>
LLMSYS_INLINE void across(const F32 (&rows)[kTileRows], float* to, Combine combine) {
  for (int64_t from = 0; from < kLaneRows; from += kLanes) {
    F32 v[kLanes];
    for (int i = 0; i < kLanes; ++i) v[i] = from + i < kTileRows ? rows[from + i] : F32{};
    transpose(v);
    F32 result = v[0];
    for (int i = 1; i < kLanes; ++i) result = combine(v[i], result);
    store(to + from, result);
  }
}

// kTileRows queries on their way through the keys.
struct Tile {
  alignas(64) float highest[kLaneRows];  // of the scores so far
  alignas(64) float total[kLaneRows];    // of e^(score - highest)
  float* query;                          // packed
  float* sums;                           // (kTileRows, value columns) of e^(score - highest) v
};

template <class Items>
class Forward {
 public:
  explicit Forward(const Attention& args)
      : args_(args),
        changes_(changes_scores(args)),
        factor_(changes_ ? 1.0f : args.scale),
        dim_items_(ceil_div(args.dim, Items::kElements)),
        value_columns_(round_up(args.value_dim, kTileCols)),
        blocks_(ceil_div(args.keys, kBlockKeys)),
        keys_of_pair_(blocks_ * kBlockKeys * dim_items_),
        values_of_pair_(blocks_ * kKeyItems<Items> * value_columns_),
        philox_(uint64_t(args.seed)) {}

  void run() const {
    const int64_t pairs = args_.batch * args_.kv_heads;
    const int64_t of_pair = larger(keys_of_pair_ + values_of_pair_, 1);
    const int64_t wave = larger(1, smaller(pairs, kPackedFloats / of_pair));
    float* packed = packed_by_thread.at_least(wave * of_pair);
    for (int64_t pair = 0; pair < pairs; pair += wave) run_wave(pair, smaller(pair + wave, pairs), packed);
    packed_by_thread.keep_at_most(kPackedFloats);
  }

 private:
  void run_wave(int64_t pair, int64_t pair_end, float* packed) const {
    const int64_t pairs = pair_end - pair, group = args_.heads / args_.kv_heads;
    const int64_t per_item = kTiles * kTileRows, items = ceil_div(args_.queries, per_item);
    // A thread's while: some microseconds of products.
    const int64_t products = pairs * group * args_.queries * args_.keys * (args_.dim + args_.value_dim);
    const int64_t threads = 1 + products / (int64_t(1) << 19);
    parallel_each(pairs * blocks_, threads, [&](int64_t i) {
      const int64_t at = i / blocks_, block = i % blocks_;
      const int64_t b = (pair + at) / args_.kv_heads, kv_head = (pair + at) % args_.kv_heads;
      const int64_t begin = block * kBlockKeys, end = smaller(begin + kBlockKeys, args_.keys);
      float* keys = packed + at * (keys_of_pair_ + values_of_pair_);
      float* values = keys + keys_of_pair_ + block * kKeyItems<Items> * value_columns_;
      pack_across<Items>(key_rows(args_, b, kv_head), begin, end, keys + begin * dim_items_);
      pack_along<Items>(value_rows(args_, b, kv_head), begin, end, values, kKeyItems<Items> * kTileCols);
    });
    // Of causal attention the last queries see the most keys: they come first.
    parallel_each(items * pairs * group, threads, [&](int64_t i) {
      const int64_t at = i % (pairs * group) / group, kv_head = (pair + at) % args_.kv_heads;
      const int64_t begin = (items - 1 - i / (pairs * group)) * per_item;
      const float* keys = packed + at * (keys_of_pair_ + values_of_pair_);
      run_queries({args_, (pair + at) / args_.kv_heads, kv_head * group + i % group, begin,
                   smaller(begin + per_item, args_.queries)},
                  keys, keys + keys_of_pair_);
    });
  }

  void run_queries(const Queries& queries, const float* keys, const float* values) const {
    const int64_t of_query = round_up(dim_items_ * kTileRows + kPanelSlack, 16);
    const int64_t of_sums = kTileRows * value_columns_;
    float* memory = sums_by_thread.at_least(kTiles * (of_query + of_sums));
    Tile tiles[kTiles];
    const int64_t num_tiles = ceil_div(queries.end - queries.begin, kTileRows);
    for (int64_t i = 0; i < num_tiles; ++i) {
      tiles[i].query = memory + i * (of_query + of_sums);
      tiles[i].sums = tiles[i].query + of_query;
      for (float& highest : tiles[i].highest) highest = -kInfinity;
      memset(tiles[i].total, 0, sizeof tiles[i].total);
      memset(tiles[i].sums, 0, of_sums * sizeof(float));
      pack_left<Items>(query_rows(args_, queries.b, queries.h), queries.begin + i * kTileRows, tiles[i].query);
    }
    const Run all = queries.keys();
    for (int64_t block = all.begin / kBlockKeys; block * kBlockKeys < all.end; ++block)
      for (int64_t i = 0; i < num_tiles; ++i) {
        const Queries mine = part(queries, i);
        const Run seen = mine.keys();
        for_each_run(mine, {larger(seen.begin, block * kBlockKeys), smaller(seen.end, (block + 1) * kBlockKeys)},
                     [&](Run run) { take(mine, run, keys, values, tiles[i]); });
      }
    for (int64_t i = 0; i < num_tiles; ++i) finish(part(queries, i), tiles[i]);
  }

  static Queries part(const Queries& queries, int64_t tile) {
    const int64_t begin = queries.begin + tile * kTileRows;
    return {queries.args, queries.b, queries.h, begin, smaller(begin + kTileRows, queries.end)};
  }

  // Adds what the keys of `run`, within one block, are to a tile.
  void take(const Queries& queries, Run run, const float* keys, const float* values, Tile& tile) const {
    alignas(64) float scores[kTileRows * kBlockKeys], probabilities[kTileRows * kKeyRow<Items>];
    const int64_t size = run.end - run.begin;
    for (int64_t s = 0; s < size; s += kTileCols)
      multiply_tile<Items, 1, kTileRows>(dim_items_, tile.query, keys + (run.begin + s) * dim_items_, scores + s,
                                         kBlockKeys, false);
    if (changes_)
      for (int64_t t = queries.begin; t < queries.end; ++t)
        change_scores(queries, t, run, scores + (t - queries.begin) * kBlockKeys, nullptr);
    for (int64_t s = 0; s < size; s += kTileCols)
      if (!queries.all_see({run.begin + s, run.begin + s + kTileCols}))
        for (int64_t t = queries.begin; t < queries.end; ++t) {
          float* z = scores + (t - queries.begin) * kBlockKeys + s;
          for (int64_t i = 0; i < kTileCols; i += kLanes)
            store(z + i, seen_alone(queries, t, run.begin + s + i, load(z + i)));
        }
    raise_highest(scores, size, tile);
    if (args_.threshold)
      exponentials<true>(queries, run, scores, probabilities, tile);
    else
      exponentials<false>(queries, run, scores, probabilities, tile);
    const int64_t items = ceil_div(queries.last_key(run) - run.begin, Items::kElements);
    const int64_t block = run.begin / kBlockKeys, skipped = run.begin % kBlockKeys / Items::kElements;
    const float* panel = values + block * kKeyItems<Items> * value_columns_ + skipped * kTileCols;
    for (int64_t column = 0; column < value_columns_; column += kTileCols)
      multiply_tile<Items, kKeyRow<Items>, 1>(items, probabilities, panel + column * kKeyItems<Items>,
                                              tile.sums + column, value_columns_, true);
  }

  // The highest score of each row, and what came before brought down to it.
  void raise_highest(const float* scores, int64_t size, Tile& tile) const {
    F32 rows[kTileRows];
    for (int r = 0; r < kTileRows; ++r) {
      F32 highest = load(scores + r * kBlockKeys);
      for (int64_t s = kLanes; s < size; s += kLanes) highest = max(load(scores + r * kBlockKeys + s), highest);
      rows[r] = highest;
    }
    alignas(64) float found[kLaneRows], factor[kLaneRows];
    across(rows, found, [](F32 a, F32 b) { return max(a, b); });
    bool rises = false;
    for (int64_t from = 0; from < kLaneRows; from += kLanes) {
      const F32 before = load(tile.highest + from), after = max(load(found + from) * factor_, before);
      const F32 fall = exp_flushed(before - select(after == -kInfinity, F32{}, after));
      store(tile.highest + from, after);
      store(tile.total + from, load(tile.total + from) * fall);
      store(factor + from, fall);
      rises = rises || !all(fall == 1.0f);
    }
    if (!rises) return;
    for (int r = 0; r < kTileRows; ++r)
      for (int64_t column = 0; column < value_columns_; column += kLanes) {
        float* sums = tile.sums + r * value_columns_ + column;
        store(sums, load(sums) * factor[r]);
      }
  }

  template <bool kDrops>
  void exponentials(const Queries& queries, Run run, const float* scores, float* probabilities, Tile& tile) const {
    F32 rows[kTileRows];
    for (int r = 0; r < kTileRows; ++r) {
      const float highest = tile.highest[r] == -kInfinity ? 0.0f : tile.highest[r];
      const float* z = scores + r * kBlockKeys;
      float* p = probabilities + r * kKeyRow<Items>;
      F32 low_total = {}, high_total = {};
      for (int64_t s = 0; s < run.end - run.begin; s += 2 * kLanes) {
        // Not fused: 1, exactly, for the highest.
        F32 low = exp_flushed(load(z + s) * factor_ - highest),
            high = exp_flushed(load(z + s + kLanes) * factor_ - highest);
        low_total = low_total + low;
        high_total = high_total + high;
        if constexpr (kDrops) {
          const Block factors = kept(queries, philox_, queries.begin + r, run.begin + s);
          low = low * factors.first;
          high = high * factors.second;
        }
        store_along_keys<Items>(p, s, low, high);
      }
      rows[r] = low_total + high_total;
    }
    alignas(64) float found[kLaneRows];
    across(rows, found, [](F32 a, F32 b) { return a + b; });
    for (int64_t from = 0; from < kLaneRows; from += kLanes)
      store(tile.total + from, load(tile.total + from) + load(found + from));
  }

  void finish(const Queries& queries, const Tile& tile) const {
    with_type(args_.dtype, [&](auto element) { finish<decltype(element)>(queries, tile); });
  }

  template <class T>
  void finish(const Queries& queries, const Tile& tile) const {
    for (int64_t t = queries.begin; t < queries.end; ++t) {
      const int64_t r = t - queries.begin;
      float highest = tile.highest[r], total = tile.total[r], scale = total == 0 ? 0.0f : 1.0f / total;
      if (args_.sinks && args_.sinks[queries.h] > -kInfinity) {
        const float sink = args_.sinks[queries.h], top = highest > sink ? highest : sink;
        const float fall = __builtin_expf(highest - top);
        total = total * fall + __builtin_expf(sink - top);
        scale = fall / total;
        highest = top;
      }
      args_.lse[(queries.b * args_.heads + queries.h) * args_.queries + t] =
          total == 0 ? -kInfinity : highest + __builtin_logf(total);
      T* y = static_cast<T*>(args_.y) + ((queries.b * args_.queries + t) * args_.heads + queries.h) * args_.value_dim;
      for (int64_t column = 0; column < args_.value_dim; column += kLanes)
        store_some(y + column, load(tile.sums + r * value_columns_ + column) * scale,
                   int(smaller(kLanes, args_.value_dim - column)));
    }
  }

  const Attention& args_;
  const bool changes_;
  const float factor_;  // from what scores are kept as to scores
  const int64_t dim_items_, value_columns_, blocks_, keys_of_pair_, values_of_pair_;
  const PhiloxKeys philox_;
};

}  // namespace

void attention_forward(const Attention& args) {
  if (args.batch * args.queries == 0) return;
  with_items(args.dtype, [&](auto items) { Forward<decltype(items)>(args).run(); });
}

}  // namespace llmsys::cpu::LLMSYS_ISA

LLMSYS_DISPATCH(attention_forward, Attention)
