// Scores are computed again, a block of keys with a block of queries at a time: five products of matrices. Each element
// of dq, dk and dv is summed over blocks in their order, whatever the number of threads.
//
// Long because the two ways over the blocks, by keys and by queries, and dbias share what a block of scores becomes.
#include "attention_tile.h"
#include "buffer.h"
#include "dispatch.h"

namespace llmsys::cpu::LLMSYS_ISA {
namespace {

thread_local Buffer packed_by_thread, dq_by_thread, sums_by_thread, tile_by_thread, scores_by_thread;
constexpr int64_t kKeptFloats = int64_t(4) << 20;  // of a buffer, from one call to the next

// Which gradients a block of keys with a block of queries is added to.
enum class Wanted { all, of_keys, of_queries };

template <class Items>
class Backward {
 public:
  explicit Backward(const Attention& args)
      : args_(args),
        changes_(changes_scores(args)),
        group_(args.heads / args.kv_heads),
        dim_items_(ceil_div(args.dim, Items::kElements)),
        value_items_(ceil_div(args.value_dim, Items::kElements)),
        columns_(round_up(args.dim, kTileCols)),
        value_columns_(round_up(args.value_dim, kTileCols)),
        key_blocks_(ceil_div(args.keys, kBlockKeys)),
        query_blocks_(ceil_div(args.queries, kBlockRows)),
        of_keys_(kBlockKeys * (dim_items_ + value_items_) + kKeyItems<Items> * columns_),
        of_queries_(kRowItems * (columns_ + value_columns_)),
        philox_(uint64_t(args.seed)) {}

  void run() const {
    sum_outputs();
    const int64_t pairs = args_.batch * args_.kv_heads, threads = max_threads();
    // With too few heads for the threads, gradients of keys and of queries are made apart: seven products, not five.
    if (5 * ceil_div(pairs, threads) * threads <= 7 * pairs)
      parallel_each(pairs, threads, [&](int64_t pair) {
        const Pair packed = reserve(pair, packed_by_thread);
        for (int64_t i = 0; i < key_blocks_; ++i) pack_keys(packed, i);
        for (int64_t i = 0; i < group_ * query_blocks_; ++i) pack_queries(packed, i / query_blocks_, i % query_blocks_);
        float* dq = dq_by_thread.at_least(group_ * query_blocks_ * kBlockRows * columns_);
        memset(dq, 0, group_ * query_blocks_ * kBlockRows * columns_ * sizeof(float));
        for (int64_t block = 0; block < key_blocks_; ++block) run_keys(packed, block, Wanted::all, dq);
        for (int64_t i = 0; i < group_ * query_blocks_; ++i)
          write_dq(packed, i / query_blocks_, i % query_blocks_, dq + i * kBlockRows * columns_);
        release();
      });
    else
      for (int64_t pair = 0; pair < pairs; ++pair) {
        const Pair packed = reserve(pair, packed_by_thread);
        parallel_each(key_blocks_, threads, [&](int64_t i) { pack_keys(packed, i); });
        parallel_each(group_ * query_blocks_, threads,
                      [&](int64_t i) { pack_queries(packed, i / query_blocks_, i % query_blocks_); });
        // Of causal attention the first keys are seen by the most queries, and the last queries see the most keys.
        parallel_each(key_blocks_, threads, [&](int64_t i) { run_keys(packed, i, Wanted::of_keys, nullptr); });
        parallel_each(group_ * query_blocks_, threads,
                      [&](int64_t i) { run_queries(packed, i % group_, query_blocks_ - 1 - i / group_); });
        release();
      }
  }

  // dbias, which sums over the batch and the heads that one bias serves.
  void run_dbias() const {
    const int64_t pairs = args_.batch * args_.kv_heads, of_pair = key_blocks_ * of_keys_;
    float* keys = packed_by_thread.at_least(pairs * of_pair);
    parallel_each(pairs * key_blocks_, max_threads(), [&](int64_t i) {
      const int64_t pair = i / key_blocks_;
      pack_keys({pair / args_.kv_heads, pair % args_.kv_heads, keys + pair * of_pair, nullptr}, i % key_blocks_);
    });
    const int64_t tiles = ceil_div(args_.queries, kTileRows);
    parallel_each(args_.bias_batches * args_.bias_heads * tiles, max_threads(), [&](int64_t i) {
      const int64_t b = i / tiles / args_.bias_heads, h = i / tiles % args_.bias_heads;
      const int64_t begin = i % tiles * kTileRows, end = smaller(begin + kTileRows, args_.queries);
      float* dbias = args_.dbias + ((b * args_.bias_heads + h) * args_.queries + begin) * args_.keys;
      memset(dbias, 0, (end - begin) * args_.keys * sizeof(float));
      for (int64_t batch = b; batch < (args_.bias_batches > 1 ? b + 1 : args_.batch); ++batch)
        for (int64_t head = h; head < (args_.bias_heads > 1 ? h + 1 : args_.heads); ++head) {
          const float* of_head = keys + (batch * args_.kv_heads + head / group_) * of_pair;
          add_dbias({args_, batch, head, begin, end}, of_head, dbias);
        }
    });
    release();
  }

 private:
  static constexpr int64_t kRowItems = kBlockRows / Items::kElements;
  static constexpr int64_t kTileItems = kTileRows / Items::kElements;
  static constexpr int64_t kRowTiles = kBlockRows / kTileRows;

  // A key head of one sequence and its query heads, packed.
  struct Pair {
    int64_t b, kv_head;
    float *keys, *queries;
  };

  // A block of keys: for scores, for the gradient of probabilities, and for dq.
  const float* keys_for_scores(const float* keys, int64_t block) const { return keys + block * of_keys_; }
  const float* values_for_dp(const float* keys, int64_t block) const {
    return keys_for_scores(keys, block) + kBlockKeys * dim_items_;
  }
  const float* keys_for_dq(const float* keys, int64_t block) const {
    return values_for_dp(keys, block) + kBlockKeys * value_items_;
  }
  // A block of queries of one head of the group: for dk, and dy for dv.
  const float* queries_for_dk(const float* queries, int64_t head, int64_t block) const {
    return queries + (head * query_blocks_ + block) * of_queries_;
  }
  const float* dy_for_dv(const float* queries, int64_t head, int64_t block) const {
    return queries_for_dk(queries, head, block) + kRowItems * columns_;
  }

  Rows dy_rows(int64_t b, int64_t h) const {
    return rows_of(args_.dy, args_.dtype, b * args_.dy_batch_stride + h * args_.dy_head_stride, args_.dy_row_stride,
                   args_.queries, args_.value_dim);
  }

  Pair reserve(int64_t pair, Buffer& buffer) const {
    float* keys = buffer.at_least(key_blocks_ * of_keys_ + group_ * query_blocks_ * of_queries_);
    return {pair / args_.kv_heads, pair % args_.kv_heads, keys, keys + key_blocks_ * of_keys_};
  }

  static void release() {
    packed_by_thread.keep_at_most(kKeptFloats);
    dq_by_thread.keep_at_most(kKeptFloats);
  }

  void pack_keys(const Pair& pair, int64_t block) const {
    const int64_t begin = block * kBlockKeys, end = smaller(begin + kBlockKeys, args_.keys);
    const Rows keys = key_rows(args_, pair.b, pair.kv_head);
    pack_across<Items>(keys, begin, end, const_cast<float*>(keys_for_scores(pair.keys, block)));
    pack_across<Items>(value_rows(args_, pair.b, pair.kv_head), begin, end,
                       const_cast<float*>(values_for_dp(pair.keys, block)));
    pack_along<Items>(keys, begin, end, const_cast<float*>(keys_for_dq(pair.keys, block)),
                      kKeyItems<Items> * kTileCols);
  }

  void pack_queries(const Pair& pair, int64_t head, int64_t block) const {
    const int64_t begin = block * kBlockRows, end = smaller(begin + kBlockRows, args_.queries);
    const int64_t h = pair.kv_head * group_ + head;
    pack_along<Items>(query_rows(args_, pair.b, h), begin, end,
                      const_cast<float*>(queries_for_dk(pair.queries, head, block)), kRowItems * kTileCols);
    pack_along<Items>(dy_rows(pair.b, h), begin, end, const_cast<float*>(dy_for_dv(pair.queries, head, block)),
                      kRowItems * kTileCols);
  }

  // delta = the sum of dy * y over a row, less dlse.
  void sum_outputs() const {
    with_type(args_.dtype, [&](auto element) {
      using T = decltype(element);
      const int64_t dim = args_.value_dim;
      parallel_for(args_.batch * args_.queries, grain_of(2 * args_.heads * dim * int64_t(sizeof(T))),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t row = begin; row < end; ++row)
                       for (int64_t h = 0; h < args_.heads; ++h) {
                         const int64_t b = row / args_.queries, t = row % args_.queries;
                         const T* y = static_cast<const T*>(args_.y) + (row * args_.heads + h) * dim;
                         const T* dy = static_cast<const T*>(args_.dy) + b * args_.dy_batch_stride +
                                       t * args_.dy_row_stride + h * args_.dy_head_stride;
                         F32 sum = {};
                         for (int64_t i = 0; i < dim; i += kLanes) {
                           const int count = int(smaller(kLanes, dim - i));
                           sum = multiply_add(load_some(y + i, count), load_some(dy + i, count), sum);
                         }
                         double total = 0;
                         for (int lane = 0; lane < kLanes; ++lane) total += sum[lane];
                         const int64_t at = (b * args_.heads + h) * args_.queries + t;
                         args_.delta[at] = float(args_.dlse ? total - args_.dlse[at] : total);
                       }
                   });
    });
  }

  // What the queries of a tile, packed, make of one panel of keys after another.
  struct Tile {
    alignas(64) float scores[kTileRows * kTileCols];  // then probabilities
    alignas(64) float dp[kTileRows * kTileCols];      // then the gradients of the scores
    alignas(64) float slopes[kTileRows * kTileCols];
    alignas(64) float negative_lse[kTileRows], delta[kTileRows];
    float *query, *dy;
  };

  void enter(const Queries& queries, Tile& tile) const {
    const int64_t of_query = round_up(dim_items_ * kTileRows + kPanelSlack, 16);
    const int64_t of_dy = round_up(value_items_ * kTileRows + kPanelSlack, 16);
    tile.query = tile_by_thread.at_least(of_query + of_dy);
    tile.dy = tile.query + of_query;
    pack_left<Items>(query_rows(args_, queries.b, queries.h), queries.begin, tile.query);
    pack_left<Items>(dy_rows(queries.b, queries.h), queries.begin, tile.dy);
    const int64_t at = (queries.b * args_.heads + queries.h) * args_.queries + queries.begin;
    for (int64_t r = 0; r < kTileRows; ++r) {
      const bool none = r >= queries.end - queries.begin || args_.lse[at + r] == -kInfinity;
      tile.negative_lse[r] = none ? -kInfinity : -args_.lse[at + r];
      tile.delta[r] = none ? 0.0f : args_.delta[at + r];
    }
  }

  // Probabilities, as they are multiplied with dy, and the gradients of scores for a panel of keys: from it on, of the
  // block at `keys`. With kBias, the gradients before the softcap's slope.
  template <bool kBias>
  void differentiate(const Queries& queries, const float* keys, Run panel, Tile& tile) const {
    const int64_t block = panel.begin / kBlockKeys, at = panel.begin % kBlockKeys;
    multiply_tile<Items, 1, kTileRows>(dim_items_, tile.query, keys_for_scores(keys, block) + at * dim_items_,
                                       tile.scores, kTileCols, false);
    multiply_tile<Items, 1, kTileRows>(value_items_, tile.dy, values_for_dp(keys, block) + at * value_items_, tile.dp,
                                       kTileCols, false);
    const bool capped = args_.softcap != 0 && !kBias;
    if (changes_)
      for (int64_t t = queries.begin; t < queries.end; ++t) {
        const int64_t r = (t - queries.begin) * kTileCols;
        change_scores(queries, t, panel, tile.scores + r, capped ? tile.slopes + r : nullptr);
      }
    const bool all_seen = queries.all_see(panel), drops = args_.threshold != 0;
    const float factor = changes_ ? 1.0f : args_.scale;
    for (int r = 0; r < kTileRows; ++r) {
      const int64_t t = queries.begin + r;
      if (t >= queries.end) {  // nothing there: zeros
        memset(tile.scores + r * kTileCols, 0, kTileCols * sizeof(float));
        memset(tile.dp + r * kTileCols, 0, kTileCols * sizeof(float));
        continue;
      }
      float *z = tile.scores + r * kTileCols, *dp = tile.dp + r * kTileCols;
      Block score = {load(z), load(z + kLanes)}, grad = {load(dp), load(dp + kLanes)};
      if (!all_seen) {
        score.first = seen_alone(queries, t, panel.begin, score.first);
        score.second = seen_alone(queries, t, panel.begin + kLanes, score.second);
      }
      const F32 negative_lse = splat(tile.negative_lse[r]);
      // Not fused: 1, exactly, where a query sees one key.
      const Block p = {exp_flushed(score.first * factor + negative_lse),
                       exp_flushed(score.second * factor + negative_lse)};
      Block used = p;
      if (drops) {
        const Block factors = kept(queries, philox_, t, panel.begin);
        used = {p.first * factors.first, p.second * factors.second};
        grad = {grad.first * factors.first, grad.second * factors.second};
      }
      Block dz = {p.first * (grad.first - tile.delta[r]), p.second * (grad.second - tile.delta[r])};
      if (capped) {
        const float* slope = tile.slopes + r * kTileCols;
        dz = {dz.first * load(slope), dz.second * load(slope + kLanes)};
      }
      store_pair<false>(z, used.first, used.second);
      store_pair<false>(dp, dz.first, dz.second);
    }
  }

  // Probabilities and gradients of scores of a block of keys with a block of queries, in the orders that products take.
  struct Scores {
    alignas(64) float p_rows[kRowItems * kBlockKeys];        // summed over queries
    alignas(64) float dz_rows[kRowItems * kBlockKeys];       // summed over queries
    alignas(64) float dz_keys[kBlockRows * kKeyRow<Items>];  // summed over keys
    Run panels[kRowTiles];  // that each tile of queries sees, from the block's first key
  };

  static Scores& scores_memory() {
    return *reinterpret_cast<Scores*>(scores_by_thread.at_least(sizeof(Scores) / sizeof(float)));
  }

  void fill(const Pair& pair, int64_t head, int64_t query_block, int64_t key_block, Scores& block) const {
    const int64_t first_key = key_block * kBlockKeys, end = smaller((query_block + 1) * kBlockRows, args_.queries);
    Tile tile;
    for (int64_t i = 0; i < kRowTiles; ++i) {
      const int64_t begin = query_block * kBlockRows + i * kTileRows;
      float* p_rows = block.p_rows + i * kTileItems * kBlockKeys;
      float* dz_rows = block.dz_rows + i * kTileItems * kBlockKeys;
      Run run = {0, 0};
      if (begin < end) {
        const Queries queries{args_, pair.b, pair.kv_head * group_ + head, begin, smaller(begin + kTileRows, end)};
        const Run keys = queries.keys();
        run = {larger(keys.begin, first_key) - first_key,
               smaller(keys.end, smaller(first_key + kBlockKeys, round_up(args_.keys, kTileCols))) - first_key};
        if (run.begin < run.end) {
          enter(queries, tile);
          for (int64_t at = run.begin; at < run.end; at += kTileCols) {
            const Run panel = {first_key + at, first_key + at + kTileCols};
            if (queries.let_through(panel)) {
              differentiate<false>(queries, pair.keys, panel, tile);
            } else {
              memset(tile.scores, 0, sizeof tile.scores);
              memset(tile.dp, 0, sizeof tile.dp);
            }
            put_panel(tile, at, p_rows, dz_rows, block.dz_keys + i * kTileRows * kKeyRow<Items>);
          }
        } else {
          run = {0, 0};
        }
      }
      block.panels[i] = run;
      // What a tile of keys takes in with the others' of its queries.
      for (int64_t item = 0; item < kTileItems; ++item)
        for (float* rows : {p_rows + item * kBlockKeys, dz_rows + item * kBlockKeys}) {
          memset(rows, 0, run.begin * sizeof(float));
          memset(rows + run.end, 0, (kBlockKeys - run.end) * sizeof(float));
        }
    }
  }

  static void put_panel(const Tile& tile, int64_t at, float* p_rows, float* dz_rows, float* dz_keys) {
    for (int r = 0; r < kTileRows; r += 2) {
      const int64_t item = r / Items::kElements * kBlockKeys;
      for (int half = 0; half < kTileCols; half += kLanes) {
        const float *p = tile.scores + r * kTileCols + half, *dz = tile.dp + r * kTileCols + half;
        store_along_rows<Items>(p_rows + item, at + half, load(p), load(p + kTileCols));
        store_along_rows<Items>(dz_rows + item, at + half, load(dz), load(dz + kTileCols));
      }
    }
    for (int r = 0; r < kTileRows; ++r)
      store_along_keys<Items>(dz_keys + r * kKeyRow<Items>, at, load(tile.dp + r * kTileCols),
                              load(tile.dp + r * kTileCols + kLanes));
  }

  bool meet(int64_t query_block, int64_t key_block) const {
    const int64_t begin = query_block * kBlockRows, end = smaller(begin + kBlockRows, args_.queries);
    return args_.rows[begin] < (key_block + 1) * kBlockKeys &&
           args_.rows[args_.queries + end - 1] > key_block * kBlockKeys;
  }

  // Everything that one block of keys takes part in.
  void run_keys(const Pair& pair, int64_t key_block, Wanted wanted, float* dq) const {
    Scores& block = scores_memory();
    const int64_t size = kBlockKeys * (columns_ + value_columns_);
    float *dk = sums_by_thread.at_least(size), *dv = dk + kBlockKeys * columns_;
    memset(dk, 0, size * sizeof(float));
    for (int64_t head = 0; head < group_; ++head)
      for (int64_t i = 0; i < query_blocks_; ++i) {
        if (!meet(i, key_block)) continue;
        fill(pair, head, i, key_block, block);
        add_to_keys(block, key_block, i, dy_for_dv(pair.queries, head, i), block.p_rows, value_columns_, dv);
        add_to_keys(block, key_block, i, queries_for_dk(pair.queries, head, i), block.dz_rows, columns_, dk);
        if (wanted == Wanted::all)
          add_to_queries(block, keys_for_dq(pair.keys, key_block), key_block,
                         dq + (head * query_blocks_ + i) * kBlockRows * columns_);
      }
    const int64_t begin = key_block * kBlockKeys, tokens = smaller(kBlockKeys, args_.keys - begin);
    const int64_t at = (pair.b * args_.keys + begin) * args_.kv_heads + pair.kv_head;
    write(args_.dk, at, args_.kv_heads, tokens, args_.dim, dk, columns_, args_.scale);
    write(args_.dv, at, args_.kv_heads, tokens, args_.value_dim, dv, value_columns_, 1.0f);
  }

  // Everything that one block of queries takes part in.
  void run_queries(const Pair& pair, int64_t head, int64_t query_block) const {
    Scores& block = scores_memory();
    float* dq = dq_by_thread.at_least(kBlockRows * columns_);
    memset(dq, 0, kBlockRows * columns_ * sizeof(float));
    for (int64_t i = 0; i < key_blocks_; ++i) {
      if (!meet(query_block, i)) continue;
      fill(pair, head, query_block, i, block);
      add_to_queries(block, keys_for_dq(pair.keys, i), i, dq);
    }
    write_dq(pair, head, query_block, dq);
  }

  // sums += (p or dz)^T right: a row for each key, `right` a panel for each kTileCols columns.
  void add_to_keys(const Scores& block, int64_t key_block, int64_t query_block, const float* right, const float* left,
                   int64_t columns, float* sums) const {
    const int64_t items = ceil_div(smaller(kBlockRows, args_.queries - query_block * kBlockRows), Items::kElements);
    const int64_t keys = smaller(kBlockKeys, args_.keys - key_block * kBlockKeys);
    for (int64_t key = 0; key < keys; key += kTileRows) {
      // Tiles of queries that see one of these keys: neither end of what a tile sees ever falls.
      int64_t from = 0, to = kRowTiles;
      while (from < to && block.panels[from].end <= key) ++from;
      while (from < to && (block.panels[to - 1].begin >= key + kTileRows || block.panels[to - 1].end == 0)) --to;
      if (from == to) continue;
      for (int64_t column = 0; column < columns; column += kTileCols)
        multiply_tile<Items, 1, int(kBlockKeys)>(
            smaller(to * kTileItems, items) - from * kTileItems, left + from * kTileItems * kBlockKeys + key,
            right + column * kRowItems + from * kTileItems * kTileCols, sums + key * columns + column, columns, true);
    }
  }

  // dq += dz keys
  void add_to_queries(const Scores& block, const float* right, int64_t key_block, float* dq) const {
    for (int64_t i = 0; i < kRowTiles; ++i) {
      const Run run = block.panels[i];
      const int64_t from = run.begin / Items::kElements;
      const int64_t end = smaller(run.end, args_.keys - key_block * kBlockKeys);
      if (run.begin >= end) continue;
      for (int64_t column = 0; column < columns_; column += kTileCols)
        multiply_tile<Items, kKeyRow<Items>, 1>(ceil_div(end, Items::kElements) - from,
                                                block.dz_keys + i * kTileRows * kKeyRow<Items> + from,
                                                right + column * kKeyItems<Items> + from * kTileCols,
                                                dq + i * kTileRows * columns_ + column, columns_, true);
    }
  }

  void add_dbias(const Queries& queries, const float* keys, float* dbias) const {
    Tile tile;
    enter(queries, tile);
    for_each_run(queries, queries.keys(), [&](Run run) {
      for (int64_t s = run.begin; s < run.end; s += kTileCols) {
        differentiate<true>(queries, keys, {s, s + kTileCols}, tile);
        const int64_t count = smaller(kTileCols, args_.keys - s);
        for (int64_t t = queries.begin; t < queries.end; ++t) {
          float* sums = dbias + (t - queries.begin) * args_.keys + s;
          for (int64_t i = 0; i < count; ++i) sums[i] += tile.dp[(t - queries.begin) * kTileCols + i];
        }
      }
    });
  }

  void write_dq(const Pair& pair, int64_t head, int64_t block, const float* dq) const {
    const int64_t begin = block * kBlockRows, tokens = smaller(kBlockRows, args_.queries - begin);
    const int64_t at = (pair.b * args_.queries + begin) * args_.heads + pair.kv_head * group_ + head;
    write(args_.dq, at, args_.heads, tokens, args_.dim, dq, columns_, args_.scale);
  }

  // Rows of sums, times `scale`, to rows `stride` apart.
  void write(void* to, int64_t first, int64_t stride, int64_t rows, int64_t dim, const float* sums, int64_t columns,
             float scale) const {
    with_type(args_.dtype, [&](auto element) {
      using T = decltype(element);
      for (int64_t row = 0; row < rows; ++row)
        for (int64_t i = 0; i < dim; i += kLanes)
          store_some(static_cast<T*>(to) + (first + row * stride) * dim + i, load(sums + row * columns + i) * scale,
                     int(smaller(kLanes, dim - i)));
    });
  }

  const Attention& args_;
  const bool changes_;
  const int64_t group_, dim_items_, value_items_, columns_, value_columns_, key_blocks_, query_blocks_;
  const int64_t of_keys_, of_queries_;  // floats of a packed block
  const PhiloxKeys philox_;
};

}  // namespace

void attention_backward(const Attention& args) {
  if (args.batch == 0) return;
  with_items(args.dtype, [&](auto items) { Backward<decltype(items)>(args).run(); });
}

void attention_dbias(const Attention& args) {
  if (args.queries * args.keys == 0) return;
  with_items(args.dtype, [&](auto items) { Backward<decltype(items)>(args).run_dbias(); });
}

}  // namespace llmsys::cpu::LLMSYS_ISA

LLMSYS_DISPATCH(attention_backward, Attention)
LLMSYS_DISPATCH(attention_dbias, Attention)
