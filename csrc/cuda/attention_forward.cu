#include "attention.cuh"

namespace llmsys::cuda {
namespace {

using namespace attention;

// Fewer where scores are changed, which takes registers.
template <int kDim, bool kPlain>
constexpr int kTileKeys = (kDim <= 128 ? 64 : 32) / (kPlain ? 1 : 2);
// Whether queries fit the registers; then they come through the memory of the second stage of keys.
template <int kDim>
constexpr bool kHolds = kDim <= 128;

template <class T, int kDim, bool kPlain>
constexpr size_t kForwardBytes = (4 * kTileKeys<kDim, kPlain> + (kHolds<kDim> ? 0 : kTileRows)) * kDim * sizeof(T);

// The sums of one block of queries over the keys so far, each row relative to its highest score.
template <class T, int kDim, bool kPlain>
__global__ void __launch_bounds__(kThreads, 1) forward_kernel(const __grid_constant__ Attention args) {
  constexpr int kKeys = kTileKeys<kDim, kPlain>, kTileChunks = kKeys * Tile<T, kDim>::kChunks;
  LLMSYS_DYNAMIC_SHARED(Chunk<T>, memory);
  const Tile<T, kDim> held{memory + (kHolds<kDim> ? 2 : 4) * kTileChunks};

  // Of causal attention the last queries see the most keys: they come first.
  const int tiles = int(ceil_div(args.queries, kTileRows));
  const int head = int(blockIdx.x) / tiles, begin = (tiles - 1 - int(blockIdx.x) % tiles) * kTileRows;
  const int b = head / int(args.heads), h = head % int(args.heads), kv_head = h / int(args.heads / args.kv_heads);
  const Rows<T> keys = key_rows<T>(args, b, kv_head), values = value_rows<T>(args, b, kv_head);

  const int last = min(begin + kTileRows, int(args.queries)) - 1;
  const int stop = (end_key(args, last) + kKeys - 1) / kKeys;
  auto next = [&](int tile) {
    while (!kPlain && tile < stop &&
           !let_through(args, b, h, begin, begin + kTileRows, tile * kKeys, (tile + 1) * kKeys))
      ++tile;
    return tile;
  };
  auto load = [&](int tile, int stage) {
    Tile<T, kDim>{memory + 2 * stage * kTileChunks}.template load<kKeys, kThreads>(keys, tile * kKeys);
    Tile<T, kDim>{memory + (2 * stage + 1) * kTileChunks}.template load<kKeys, kThreads>(values, tile * kKeys);
  };

  int tile = next(first_key(args, begin) / kKeys);
  held.template load<kTileRows, kThreads>(query_rows<T>(args, b, h), begin);
  if (tile < stop) load(tile, 0);
  commit_copies();
  wait_for_copies<0>();
  __syncthreads();
  const int lane = threadIdx.x % kWarp, row = threadIdx.x / kWarp * kWarpRows, t = begin + row + lane / 4;
  uint32_t queries[kHolds<kDim> ? kDim / 16 : 1][4];
  if constexpr (kHolds<kDim>) {
#pragma unroll
    for (int k = 0; k < kDim / 16; ++k) held.left(row, k, queries[k]);
  }

  const Common common(args, begin, begin + kTileRows);
  QueryRows where(args, b, h, t);
  const float factor = (kPlain ? args.scale : 1.0f) * kLog2e;
  float sums[kDim / 8][4] = {}, highest[2] = {-kInfinity, -kInfinity}, total[2] = {};
  for (int stage = 0; tile < stop; stage ^= 1) {
    wait_for_copies<0>();
    __syncthreads();
    const int following = next(tile + 1);
    if (following < stop) load(following, stage ^ 1);
    commit_copies();

    float scores[kKeys / 8][4] = {};
    const Tile<T, kDim> key_tile{memory + 2 * stage * kTileChunks}, value_tile{memory + (2 * stage + 1) * kTileChunks};
    multiply_rows(
        [&](int k, uint32_t (&a)[4]) {
          if constexpr (kHolds<kDim>)
            for (int i = 0; i < 4; ++i) a[i] = queries[k][i];
          else
            held.left(row, k, a);
        },
        key_tile, scores);

    where.first_key = tile * kKeys + lane % 4 * 2;
    if constexpr (!kPlain)
      change_scores(args, where, scores, nullptr);
    else if (!common.hold(tile * kKeys, (tile + 1) * kKeys))
      for_each(scores, [&](float& z, int n, int i) {
        if (!where.query(n, i).sees(where.key(n, i))) z = -kInfinity;
      });

#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float top = highest[half];
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) top = fmaxf(top, fmaxf(scores[n][half * 2], scores[n][half * 2 + 1]));
      top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
      top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
      const float from = top == -kInfinity ? 0.0f : top, fall = exp2_flushed((highest[half] - from) * factor);
      highest[half] = top;
      total[half] *= fall;
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) {
        sums[n][half * 2] *= fall;
        sums[n][half * 2 + 1] *= fall;
      }
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n)
#pragma unroll
        for (int i = half * 2; i < half * 2 + 2; ++i) {
          const float p = exp2_flushed((scores[n][i] - from) * factor);  // 1, exactly, for the highest
          total[half] += p;
          scores[n][i] = p;
        }
    }
    if constexpr (!kPlain) {
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
        const Vector<float, 4> factors = kept(args, where, n);
        for (int i = 0; i < 4; ++i) scores[n][i] *= factors[i];
      }
    }
    multiply_columns(scores, value_tile, 0, sums);
    tile = following;
  }

  float scale[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float sum = total[half], top = highest[half] * (kPlain ? args.scale : 1.0f);
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    scale[half] = sum == 0.0f ? 0.0f : 1.0f / sum;
    if (args.sinks) {
      const float sink = args.sinks[h], higher = fmaxf(top, sink);
      sum = sum * expf(top - higher) + expf(sink - higher);
      scale[half] = expf(top - higher) / sum;
      top = higher;
    }
    if (lane % 4 == 0 && t + half * 8 < args.queries)
      args.lse[(int64_t(b) * args.heads + h) * args.queries + t + half * 8] =
          sum == 0.0f ? -kInfinity : top + logf(sum);
  }
  const int64_t stride = args.heads * args.value_dim;
  T* y = static_cast<T*>(args.y) + (int64_t(b) * args.queries + begin + row) * stride + h * args.value_dim;
  store_sums(y, stride, int(args.queries) - begin - row, int(args.value_dim), 0, scale[0], scale[1], sums);
}

}  // namespace

void attention_forward(const Attention& args, void* stream) {
  if (args.batch * args.queries == 0) return;
  with_variant("attention_forward", args, [&](auto element, auto dim, auto plain) {
    using T = decltype(element);
    const int64_t blocks = ceil_div(args.queries, kTileRows) * args.batch * args.heads;
    launch("attention_forward", {blocks_of(blocks), dim3(kThreads), kForwardBytes<T, dim, plain>}, stream,
           forward_kernel<T, dim, plain>, args);
  });
}

}  // namespace llmsys::cuda
