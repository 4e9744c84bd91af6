// Scores are computed again, twice: once by blocks of keys, for dk and dv, and once by blocks of queries, for dq. Seven
// products of matrices instead of five, and no sum over blocks: the same bits every time.
#include "attention.cuh"

namespace llmsys::cuda {
namespace {

using namespace attention;

// Rows of the tiles that are passed over: fewer where scores are changed, which takes registers.
template <int kDim, bool kPlain>
constexpr int kPassed = kDim == 256 ? 16 : (kDim == 64 ? 64 : 32) / (kPlain ? 1 : 2);

// Two tiles that stay, and two stages of two that are passed over.
template <class T, int kDim, bool kPlain>
constexpr size_t kBackwardBytes = (2 * kTileRows + 4 * kPassed<kDim, kPlain>)*kDim * sizeof(T);

// lse, as a probability is computed from: a row that sees nothing has probabilities of 0.
__device__ float finite_lse(float lse) { return lse == -kInfinity ? kInfinity : lse; }

// q.k and dy.v, into probabilities as they are multiplied with dy, and the gradients of scores; with kBias before the
// slope of the softcap. `where` also has lse and delta of each element.
template <bool kBias, int kTiles, class Where>
__device__ void differentiate(const Attention& args, const Where& where, float (&p)[kTiles][4],
                              float (&dp)[kTiles][4]) {
  float slopes[kTiles][4];
  change_scores(args, where, p, kBias ? nullptr : slopes);
#pragma unroll
  for (int n = 0; n < kTiles; ++n) {
    const Vector<float, 4> factors = kept(args, where, n);
    for (int i = 0; i < 4; ++i) {
      const float whole = exp2_flushed((p[n][i] - where.lse(n, i)) * kLog2e);
      p[n][i] = whole * factors[i];
      dp[n][i] = whole * (dp[n][i] * factors[i] - where.delta(n, i));
    }
  }
  if (!kBias && args.softcap != 0) for_each(dp, [&](float& value, int n, int i) { value *= slopes[n][i]; });
}

// The same where a score is scale * q.k.
template <int kTiles, class Where>
__device__ void differentiate_plain(const Attention& args, const Where& where, bool all_seen, float (&p)[kTiles][4],
                                    float (&dp)[kTiles][4]) {
  for_each(
      p, [&](float& value, int n, int i) { value = exp2_flushed(fmaf(value, args.scale, -where.lse(n, i)) * kLog2e); });
  if (!all_seen)
    for_each(p, [&](float& value, int n, int i) {
      if (!where.query(n, i).sees(where.key(n, i))) value = 0.0f;
    });
  for_each(dp, [&](float& value, int n, int i) { value = p[n][i] * (value - where.delta(n, i)); });
}

// With queries as rows: lse and delta from memory.
struct KnownQueryRows : QueryRows {
  float lse_of[2], delta_of[2];

  __device__ KnownQueryRows(const Attention& args, int b, int h, int first_row)
      : QueryRows(args, b, h, first_row), lse_of{kInfinity, kInfinity}, delta_of{} {
#pragma unroll
    for (int half = 0; half < 2; ++half)
      if (queries[half].t < args.queries) {
        const int64_t at = (int64_t(b) * args.heads + h) * args.queries + queries[half].t;
        lse_of[half] = finite_lse(args.lse[at]);
        delta_of[half] = args.delta[at];
      }
  }
  __device__ float lse(int, int i) const { return lse_of[i / 2]; }
  __device__ float delta(int, int i) const { return delta_of[i / 2]; }
};

// With keys as rows and queries as columns: lse and delta from shared memory.
struct KnownKeyRows {
  const Attention& args;
  int b, h, first_query, column, first_key;
  Shared<float> all_lse, all_delta;

  __device__ int place(int n, int i) const { return n * 8 + column + i % 2; }  // in the tile
  __device__ Query query(int n, int i) const { return {args, first_query + place(n, i)}; }
  __device__ int key(int, int i) const { return first_key + i / 2 * 8; }
  __device__ float lse(int n, int i) const { return finite_lse(all_lse[place(n, i)]); }
  __device__ float delta(int n, int i) const { return all_delta[place(n, i)]; }

  // The random words of the four elements. Four lanes have the four keys of each: each lane makes those of one.
  __device__ uint4 words(const Attention& args, int n) const {
    const int i = threadIdx.x / 4 % 4;
    uint4 words = random_words(args, b, h, first_query + place(n, i), key(n, i));
    exchange<4>(words.x, words.y);
    exchange<4>(words.z, words.w);
    exchange<8>(words.x, words.z);
    exchange<8>(words.y, words.w);
    return words;
  }
};

// ---- delta ----

constexpr int kRowThreads = 16, kDeltaRows = 16;

// The sum of dy * y over each row, less dlse: kRowThreads threads a row.
template <class T>
__global__ void __launch_bounds__(kRowThreads* kDeltaRows) delta_kernel(const __grid_constant__ Attention args) {
  constexpr int kWidth = kFullWidth<T>;
  const int64_t rows = args.batch * args.queries * args.heads, row = int64_t(blockIdx.x) * kDeltaRows + threadIdx.y;
  const int64_t h = row % args.heads, t = row / args.heads % args.queries, b = row / args.heads / args.queries;
  float sum = 0.0f;
  if (row < rows) {
    const T* y = static_cast<const T*>(args.y) + row * args.value_dim;
    const Rows<T> all = dy_rows<T>(args, int(b), int(h));
    const T* dy = all.data + t * all.stride;
    const bool chunks = all.chunks() && reinterpret_cast<uintptr_t>(args.y) % sizeof(Chunk<T>) == 0;
    for (int i = threadIdx.x * kWidth; i < all.columns; i += kRowThreads * kWidth) {
      if (chunks) {
        const Chunk<T> a = cuda::load<kWidth>(y + i), c = cuda::load<kWidth>(dy + i);
        for (int j = 0; j < kWidth; ++j) sum += a[j] * c[j];
      } else {
        for (int j = i; j < min(i + kWidth, all.columns); ++j) sum += to_float(y[j]) * to_float(dy[j]);
      }
    }
  }
  for (int offset = kRowThreads / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  if (row >= rows || threadIdx.x > 0) return;
  const int64_t at = (b * args.heads + h) * args.queries + t;
  args.delta[at] = args.dlse ? sum - args.dlse[at] : sum;
}

// ---- dk, dv ----

// Of wide heads, each four warps sum kColumns columns.
template <int kDim>
constexpr int kColumns = kDim <= 128 ? kDim : 128;
template <int kDim>
constexpr int kKeyThreads = kThreads * kDim / kColumns<kDim>;

// The first t with values[t] > bound, `size` if there is none; values never fall. By whole warps.
__device__ int first_above(const int32_t* values, int size, int bound) {
  int low = 0, high = size;
  while (low < high) {
    const int step = (high - low + kWarp - 1) / kWarp, probe = low + int(threadIdx.x % kWarp) * step;
    const bool below = probe < high && values[probe] <= bound;
    const int count = int(warp_reduce(below ? 1.0f : 0.0f, Add{}));
    if (count == 0) return low;
    high = min(high, low + count * step);
    low += (count - 1) * step + 1;
  }
  return low;
}

// dk and dv of one block of keys, over all queries of the heads that read them. A warp's scores have a row for each of
// its keys and a column for each query.
template <class T, int kDim, bool kPlain>
__global__ void __launch_bounds__(kKeyThreads<kDim>, 1) keys_kernel(const __grid_constant__ Attention args) {
  constexpr int kQueries = kPassed<kDim, kPlain>, kTileChunks = kQueries * Tile<T, kDim>::kChunks;
  constexpr int kKept = kTileRows * Tile<T, kDim>::kChunks, kSums = kColumns<kDim> / 8;
  LLMSYS_DYNAMIC_SHARED(Chunk<T>, memory);
  LLMSYS_SHARED(float, lse, 2 * kQueries);
  LLMSYS_SHARED(float, delta, 2 * kQueries);
  const Tile<T, kDim> keys{memory}, values{memory + kKept};
  auto queries = [&](int stage) { return Tile<T, kDim>{memory + (2 * kKept + 2 * stage * kTileChunks)}; };
  auto dy = [&](int stage) { return Tile<T, kDim>{memory + (2 * kKept + (2 * stage + 1) * kTileChunks)}; };

  const int blocks = int(ceil_div(args.keys, kTileRows)), group = int(args.heads / args.kv_heads);
  const int pair = int(blockIdx.x) / blocks, begin = int(blockIdx.x) % blocks * kTileRows;
  const int b = pair / int(args.kv_heads), kv_head = pair % int(args.kv_heads), num_queries = int(args.queries);
  const int end = min(begin + kTileRows, int(args.keys));

  // Tiles of the queries that see one of these keys, for each head.
  const int from = first_above(args.rows + num_queries, num_queries, begin) / kQueries;
  const int to = (first_above(args.rows, num_queries, end - 1) + kQueries - 1) / kQueries;
  const int tiles = to > from ? to - from : 0, steps = tiles * group;
  auto head_of = [&](int step) { return kv_head * group + step / tiles; };
  auto query_of = [&](int step) { return (from + step % tiles) * kQueries; };
  auto next = [&](int step) {
    while (!kPlain && step < steps &&
           !let_through(args, b, head_of(step), query_of(step), query_of(step) + kQueries, begin, end))
      ++step;
    return step;
  };
  auto load = [&](int step, int stage) {
    const int h = head_of(step), t = query_of(step);
    queries(stage).template load<kQueries, kKeyThreads<kDim>>(query_rows<T>(args, b, h), t);
    dy(stage).template load<kQueries, kKeyThreads<kDim>>(dy_rows<T>(args, b, h), t);
    // Rows beyond the last have zeros in all of these: whatever their probabilities, they add nothing.
    const int64_t at = (int64_t(b) * args.heads + h) * args.queries + t;
    if (const int i = threadIdx.x; i < kQueries) {
      const bool there = t + i < num_queries;
      copy_async(lse + (stage * kQueries + i), static_cast<const float*>(args.lse) + (there ? at + i : 0), there);
      copy_async(delta + (stage * kQueries + i), static_cast<const float*>(args.delta) + (there ? at + i : 0), there);
    }
  };

  int step = next(0);
  if (step < steps) {
    keys.template load<kTileRows, kKeyThreads<kDim>>(key_rows<T>(args, b, kv_head), begin);
    values.template load<kTileRows, kKeyThreads<kDim>>(value_rows<T>(args, b, kv_head), begin);
    load(step, 0);
    commit_copies();
  }
  const int lane = threadIdx.x % kWarp, row = threadIdx.x % kThreads / kWarp * kWarpRows;
  const int column = threadIdx.x / kThreads * kColumns<kDim>;
  float dk[kSums][4] = {}, dv[kSums][4] = {};
  for (int stage = 0; step < steps; stage ^= 1) {
    wait_for_copies<0>();
    __syncthreads();
    const int following = next(step + 1);
    if (following < steps) load(following, stage ^ 1);
    commit_copies();

    const int first = query_of(step);
    const Common common(args, first, first + kQueries);
    float p[kQueries / 8][4] = {}, ds[kQueries / 8][4] = {};
    multiply_rows([&](int k, uint32_t (&a)[4]) { keys.left(row, k, a); }, queries(stage), p);
    multiply_rows([&](int k, uint32_t (&a)[4]) { values.left(row, k, a); }, dy(stage), ds);
    const KnownKeyRows where{args,
                             b,
                             head_of(step),
                             first,
                             lane % 4 * 2,
                             begin + row + lane / 4,
                             lse + stage * kQueries,
                             delta + stage * kQueries};
    if constexpr (kPlain)
      differentiate_plain(args, where, common.hold(begin, begin + kTileRows), p, ds);
    else
      differentiate<false>(args, where, p, ds);
    multiply_columns(p, dy(stage), column, dv);
    multiply_columns(ds, queries(stage), column, dk);
    step = following;
  }

  const int64_t at = (int64_t(b) * args.keys + begin + row) * args.kv_heads + kv_head;
  const int rows = end - begin - row;
  store_sums(static_cast<T*>(args.dk) + at * args.dim, args.kv_heads * args.dim, rows, int(args.dim), column,
             args.scale, args.scale, dk);
  store_sums(static_cast<T*>(args.dv) + at * args.value_dim, args.kv_heads * args.value_dim, rows, int(args.value_dim),
             column, 1.0f, 1.0f, dv);
}

// ---- dq ----

template <class T, int kDim, bool kPlain>
__global__ void __launch_bounds__(kThreads, 1) queries_kernel(const __grid_constant__ Attention args) {
  constexpr int kKeys = kPassed<kDim, kPlain>, kTileChunks = kKeys * Tile<T, kDim>::kChunks;
  constexpr int kKept = kTileRows * Tile<T, kDim>::kChunks;
  LLMSYS_DYNAMIC_SHARED(Chunk<T>, memory);
  const Tile<T, kDim> queries{memory}, dy{memory + kKept};
  auto keys = [&](int stage) { return Tile<T, kDim>{memory + (2 * kKept + 2 * stage * kTileChunks)}; };
  auto values = [&](int stage) { return Tile<T, kDim>{memory + (2 * kKept + (2 * stage + 1) * kTileChunks)}; };

  // Of causal attention the last queries see the most keys: they come first.
  const int blocks = int(ceil_div(args.queries, kTileRows));
  const int head = int(blockIdx.x) / blocks, begin = (blocks - 1 - int(blockIdx.x) % blocks) * kTileRows;
  const int b = head / int(args.heads), h = head % int(args.heads), kv_head = h / int(args.heads / args.kv_heads);
  const Rows<T> all_keys = key_rows<T>(args, b, kv_head), all_values = value_rows<T>(args, b, kv_head);

  const int last = min(begin + kTileRows, int(args.queries)) - 1;
  const int stop = (end_key(args, last) + kKeys - 1) / kKeys;
  auto next = [&](int tile) {
    while (!kPlain && tile < stop &&
           !let_through(args, b, h, begin, begin + kTileRows, tile * kKeys, (tile + 1) * kKeys))
      ++tile;
    return tile;
  };
  auto load = [&](int tile, int stage) {
    keys(stage).template load<kKeys, kThreads>(all_keys, tile * kKeys);
    values(stage).template load<kKeys, kThreads>(all_values, tile * kKeys);
  };

  int tile = next(first_key(args, begin) / kKeys);
  if (tile < stop) {
    queries.template load<kTileRows, kThreads>(query_rows<T>(args, b, h), begin);
    dy.template load<kTileRows, kThreads>(dy_rows<T>(args, b, h), begin);
    load(tile, 0);
    commit_copies();
  }
  const int lane = threadIdx.x % kWarp, row = threadIdx.x / kWarp * kWarpRows, t = begin + row + lane / 4;
  const Common common(args, begin, begin + kTileRows);
  KnownQueryRows where(args, b, h, t);
  float dq[kDim / 8][4] = {};
  for (int stage = 0; tile < stop; stage ^= 1) {
    wait_for_copies<0>();
    __syncthreads();
    const int following = next(tile + 1);
    if (following < stop) load(following, stage ^ 1);
    commit_copies();

    float p[kKeys / 8][4] = {}, ds[kKeys / 8][4] = {};
    multiply_rows([&](int k, uint32_t (&a)[4]) { queries.left(row, k, a); }, keys(stage), p);
    multiply_rows([&](int k, uint32_t (&a)[4]) { dy.left(row, k, a); }, values(stage), ds);
    where.first_key = tile * kKeys + lane % 4 * 2;
    if constexpr (kPlain) {
      differentiate_plain(args, where, common.hold(tile * kKeys, (tile + 1) * kKeys), p, ds);
    } else {
      differentiate<false>(args, where, p, ds);
    }
    multiply_columns(ds, keys(stage), 0, dq);
    tile = following;
  }

  const int64_t stride = args.heads * args.dim;
  T* to = static_cast<T*>(args.dq) + (int64_t(b) * args.queries + begin + row) * stride + h * args.dim;
  store_sums(to, stride, int(args.queries) - begin - row, int(args.dim), 0, args.scale, args.scale, dq);
}

// ---- dbias ----

// dbias of one tile of queries and keys, summed over the batch and the heads that one bias serves.
template <class T, int kDim>
__global__ void __launch_bounds__(kThreads, 1) bias_kernel(const __grid_constant__ Attention args) {
  constexpr int kKeys = kPassed<kDim, false>, kKept = kTileRows * Tile<T, kDim>::kChunks;
  LLMSYS_DYNAMIC_SHARED(Chunk<T>, memory);
  const Tile<T, kDim> queries{memory}, dy{memory + kKept}, keys{memory + 2 * kKept},
      values{memory + (2 * kKept + kKeys * Tile<T, kDim>::kChunks)};
  const int across = int(ceil_div(args.keys, kKeys)), down = int(ceil_div(args.queries, kTileRows));
  const int first = int(blockIdx.x) % across * kKeys, begin = int(blockIdx.x) / across % down * kTileRows;
  const int bias = int(blockIdx.x) / across / down, group = int(args.heads / args.kv_heads);
  const int bias_b = bias / int(args.bias_heads), bias_h = bias % int(args.bias_heads);
  const int lane = threadIdx.x % kWarp, row = threadIdx.x / kWarp * kWarpRows, t = begin + row + lane / 4;
  float sums[kKeys / 8][4] = {};
  for (int b = bias_b; b < (args.bias_batches > 1 ? bias_b + 1 : args.batch); ++b)
    for (int h = bias_h; h < (args.bias_heads > 1 ? bias_h + 1 : args.heads); ++h) {
      __syncthreads();  // what the head before left has been read
      queries.template load<kTileRows, kThreads>(query_rows<T>(args, b, h), begin);
      dy.template load<kTileRows, kThreads>(dy_rows<T>(args, b, h), begin);
      keys.template load<kKeys, kThreads>(key_rows<T>(args, b, h / group), first);
      values.template load<kKeys, kThreads>(value_rows<T>(args, b, h / group), first);
      commit_copies();
      wait_for_copies<0>();
      __syncthreads();
      float p[kKeys / 8][4] = {}, ds[kKeys / 8][4] = {};
      multiply_rows([&](int k, uint32_t (&a)[4]) { queries.left(row, k, a); }, keys, p);
      multiply_rows([&](int k, uint32_t (&a)[4]) { dy.left(row, k, a); }, values, ds);
      KnownQueryRows where(args, b, h, t);
      where.first_key = first + lane % 4 * 2;
      differentiate<true>(args, where, p, ds);
      for_each(sums, [&](float& sum, int n, int i) { sum += ds[n][i]; });
    }
  float* to = args.dbias + ((int64_t(bias_b) * args.bias_heads + bias_h) * args.queries + begin + row) * args.keys;
  store_sums(to, args.keys, int(args.queries) - begin - row, int(args.keys), first, 1.0f, 1.0f, sums);
}

}  // namespace

void attention_backward(const Attention& args, void* stream) {
  if (args.batch == 0) return;
  with_variant("attention_backward", args, [&](auto element, auto dim, auto plain) {
    using T = decltype(element);
    const int64_t rows = args.batch * args.queries * args.heads;
    const int64_t query_blocks = ceil_div(args.queries, kTileRows) * args.batch * args.heads;
    const int64_t key_blocks = ceil_div(args.keys, kTileRows) * args.batch * args.kv_heads;
    if (rows > 0)
      launch("attention_backward: delta", {blocks_of(ceil_div(rows, kDeltaRows)), dim3(kRowThreads, kDeltaRows)},
             stream, delta_kernel<T>, args);
    if (key_blocks > 0)
      launch("attention_backward: dk, dv",
             {blocks_of(key_blocks), dim3(kKeyThreads<dim>), kBackwardBytes<T, dim, plain>}, stream,
             keys_kernel<T, dim, plain>, args);
    if (rows > 0)
      launch("attention_backward: dq", {blocks_of(query_blocks), dim3(kThreads), kBackwardBytes<T, dim, plain>}, stream,
             queries_kernel<T, dim, plain>, args);
  });
}

void attention_dbias(const Attention& args, void* stream) {
  if (args.queries * args.keys == 0) return;
  with_variant("attention_dbias", args, [&](auto element, auto dim, auto) {
    using T = decltype(element);
    const int64_t blocks = ceil_div(args.keys, kPassed<dim, false>) * ceil_div(args.queries, kTileRows);
    launch("attention_dbias",
           {blocks_of(blocks * args.bias_batches * args.bias_heads), dim3(kThreads), kBackwardBytes<T, dim, false>},
           stream, bias_kernel<T, dim>, args);
  });
}

}  // namespace llmsys::cuda
