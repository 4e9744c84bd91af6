#include "../rope.h"

#include <algorithm>

#include "device.cuh"

namespace llmsys::cuda {
namespace {

constexpr int kThreads = 256;

// The heads of one token, of queries or of keys.
template <class T>
struct Heads {
  const T* x;
  T* y;
  int64_t count, x_stride, y_stride;
};

template <class T>
__device__ void rotate_pair(T& first, T& second, float cos, float sin) {
  const float a = to_float(first), b = to_float(second);
  first = from_float<T>(a * cos - b * sin);
  second = from_float<T>(b * cos + a * sin);
}

// The block's threads share out the heads' pairs, kWidth at a time, then what is only copied.
template <int kWidth, bool kInterleaved, class T>
__device__ void rotate_heads(const Rope& args, const Heads<T>& heads, const float* cos, const float* sin) {
  const float sign = args.inverse ? -1.0f : 1.0f;
  // A token's elements are counted in 32 bits: division in 64 is a call, which spills.
  const int half = int(args.rotary_dim / 2), steps = half / kWidth, items = int(heads.count) * steps;
  for (int item = threadIdx.x; item < items; item += blockDim.x) {
    const int head = item / steps, i = item % steps * kWidth;
    const T* x = heads.x + head * heads.x_stride + (kInterleaved ? 2 * i : i);
    T* y = heads.y + head * heads.y_stride + (kInterleaved ? 2 * i : i);
    const auto c = load<kWidth>(cos + i), s = load<kWidth>(sin + i);
    const int apart = kInterleaved ? kWidth : half;
    auto low = load<kWidth>(x), high = load<kWidth>(x + apart);
    for (int pair = 0; pair < kWidth; ++pair) {
      const int first = 2 * pair, second = 2 * pair + 1;
      if constexpr (kInterleaved)
        rotate_pair((first < kWidth ? low : high).values[first % kWidth],
                    (second < kWidth ? low : high).values[second % kWidth], c[pair], sign * s[pair]);
      else
        rotate_pair(low.values[pair], high.values[pair], c[pair], sign * s[pair]);
    }
    store(y, low);
    store(y + apart, high);
  }
  if (heads.x == heads.y) return;
  const int rest = int(args.head_dim - args.rotary_dim), others = int(heads.count) * rest;
  for (int item = threadIdx.x; item < others; item += blockDim.x) {
    const int64_t head = item / rest, d = args.rotary_dim + item % rest;
    heads.y[head * heads.y_stride + d] = heads.x[head * heads.x_stride + d];
  }
}

// A block rotates all heads of a token, so that its row of the tables is fetched once.
template <class T, int kWidth, bool kInterleaved>
__global__ void __launch_bounds__(kThreads) rope_kernel(const Rope args) {
  for (int64_t i = blockIdx.x; i < args.batch * args.tokens; i += gridDim.x) {
    const int64_t sequence = i / args.tokens, token = i % args.tokens;
    const int64_t row = sequence * args.table_batch_stride + token * args.table_token_stride;
    const float *cos = args.cos + row, *sin = args.sin + row;
    rotate_heads<kWidth, kInterleaved, T>(
        args,
        {static_cast<const T*>(args.q) + sequence * args.q_batch_stride + token * args.q_token_stride,
         static_cast<T*>(args.q_out) + sequence * args.q_out_batch_stride + token * args.q_out_token_stride,
         args.q_heads, args.q_head_stride, args.q_out_head_stride},
        cos, sin);
    if (args.k_heads == 0) continue;
    rotate_heads<kWidth, kInterleaved, T>(
        args,
        {static_cast<const T*>(args.k) + sequence * args.k_batch_stride + token * args.k_token_stride,
         static_cast<T*>(args.k_out) + sequence * args.k_out_batch_stride + token * args.k_out_token_stride,
         args.k_heads, args.k_head_stride, args.k_out_head_stride},
        cos, sin);
  }
}

// Whether whole vectors of T, and of the tables, start at every head and at every half.
template <class T>
bool takes_vectors(const Rope& args) {
  const int64_t distances = args.rotary_dim / 2 | args.table_batch_stride | args.table_token_stride |  //
                            args.q_batch_stride | args.q_token_stride | args.q_head_stride |           //
                            args.k_batch_stride | args.k_token_stride | args.k_head_stride |           //
                            args.q_out_batch_stride | args.q_out_token_stride | args.q_out_head_stride |
                            args.k_out_batch_stride | args.k_out_token_stride | args.k_out_head_stride;
  return distances % kFullWidth<T> == 0 && aligned(args.q, args.k, args.q_out, args.k_out, args.cos, args.sin);
}

}  // namespace

void rope(const Rope& args, void* stream) {
  const int64_t rows = args.batch * args.tokens;
  if (rows == 0 || args.head_dim == 0 || args.q_heads + args.k_heads == 0) return;
  with_type(args.dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int kWidth = kFullWidth<T>;
    const int width = takes_vectors<T>(args) ? kWidth : 1;
    const int64_t items =
        std::max(args.q_heads, args.k_heads) * std::max(args.rotary_dim / 2 / width, args.head_dim - args.rotary_dim);
    unsigned threads = kWarp;
    while (threads < kThreads && threads < items) threads *= 2;
    const Grid grid{dim3(unsigned(std::min(rows, kMaxBlocks))), dim3(threads)};
    if (width == 1)
      launch("rope", grid, stream, args.interleaved ? rope_kernel<T, 1, true> : rope_kernel<T, 1, false>, args);
    else
      launch("rope", grid, stream, args.interleaved ? rope_kernel<T, kWidth, true> : rope_kernel<T, kWidth, false>,
             args);
  });
}

}  // namespace llmsys::cuda
