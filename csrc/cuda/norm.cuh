// What the norms of rows share: rows that threads keep in registers, and the sums of weight gradients.
#pragma once

#include <algorithm>

#include "../rows.h"
#include "device.cuh"

namespace llmsys::cuda {

// Used as __launch_bounds__(kMaxThreads, 1): without the 1, ptxas 13.0 saves registers for a second block, and spills.
constexpr int kMaxThreads = 512;

// Calls visit(v, i) for each vector v of a row that is this thread's: i < kHeld for those that fit its registers, else
// kHeld.
template <int kHeld, class Visit>
__device__ void for_each_vector(int64_t vectors, Visit visit) {
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int64_t v = threadIdx.x + int64_t(i) * blockDim.x;
    if (v < vectors) visit(v, i);
  }
  for (int64_t v = threadIdx.x + int64_t(kHeld) * blockDim.x; v < vectors; v += blockDim.x) visit(v, kHeld);
}

// Whether rows of these sizes and strides split into whole vectors.
template <int kWidth, class... Sizes>
bool multiples_of(Sizes... sizes) {
  return ((sizes % kWidth == 0) && ...);
}

// Threads (x: of a row, y: rows at a time), such that a row fits the registers of its threads where it can.
// Rows that do not fit have their block alone.
inline dim3 threads_for(int64_t vectors, int held, int threads) {
  const int x = int(std::clamp<int64_t>(ceil_div(vectors, held * kWarp) * kWarp, kWarp, kMaxThreads));
  return dim3(x, std::max(1, threads / x));
}

// Adds each row's `held` sums into `parts` of the block, one row of threads after the other.
template <int kHeld, int kWidth>
__device__ void add_up(const float (&held)[kHeld][kWidth], float* parts, int64_t vectors) {
  for (unsigned y = 0; y < blockDim.y; ++y) {
    if (threadIdx.y == y)
      for_each_vector<kHeld>(vectors, [&](int64_t v, int i) {
        if (i == kHeld) return;
        Vector<float, kWidth> total{};
        if (y > 0) total = load<kWidth>(parts + v * kWidth);
        for (int k = 0; k < kWidth; ++k) total.set(k, total[k] + held[i][k]);
        store(parts + v * kWidth, total);
      });
    __syncthreads();
  }
}

constexpr int kSumThreads = 16;

// A weight's gradient, the sum over the chunks: threadIdx.y takes every kSumThreads-th, then their sums are added in
// order.
template <class W>
__global__ void __launch_bounds__(kWarp* kSumThreads)
    sum_chunks_kernel(const float* partial, W* dweight, int64_t dim, int64_t chunks) {
  LLMSYS_SHARED(float, sums, kSumThreads* kWarp);
  const int64_t d = int64_t(blockIdx.x) * kWarp + threadIdx.x;
  float sum = 0.0f;
  if (d < dim)
    for (int64_t chunk = threadIdx.y; chunk < chunks; chunk += kSumThreads) sum += partial[chunk * dim + d];
  sums[threadIdx.y * kWarp + threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || d >= dim) return;
  for (int y = 1; y < kSumThreads; ++y) sum += sums[y * kWarp + threadIdx.x];
  dweight[d] = from_float<W>(sum);
}

template <class W>
void sum_chunks(const char* name, const float* partial, W* dweight, int64_t dim, int64_t chunks, void* stream) {
  const Grid columns{dim3(unsigned(ceil_div(dim, kWarp))), dim3(kWarp, kSumThreads)};
  launch(name, columns, stream, sum_chunks_kernel<W>, partial, dweight, dim, chunks);
}

// Calls visit(T{}, W{}) with the C++ types of (dtype, weight_dtype).
template <class Visit>
void with_types(DType dtype, DType weight_dtype, Visit visit) {
  with_type(dtype, [&](auto x) { weight_dtype == DType::float32 ? visit(x, float{}) : visit(x, x); });
}

}  // namespace llmsys::cuda
