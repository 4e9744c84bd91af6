#include "../swiglu.h"

#include <algorithm>

#include "device.cuh"

namespace llmsys::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocksY = 65535;

__device__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// Calls visit(row, d) for the start d of each vector of the (rows, dim) elements that is this thread's.
template <int kWidth, class Visit>
__device__ void for_each_vector(int64_t rows, int64_t dim, Visit visit) {
  const int64_t first_row = int64_t(blockIdx.y) * blockDim.y + threadIdx.y;
  const int64_t first = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * kWidth;
  for (int64_t row = first_row; row < rows; row += int64_t(gridDim.y) * blockDim.y)
    for (int64_t d = first; d < dim; d += int64_t(gridDim.x) * blockDim.x * kWidth) visit(row, d);
}

// A grid with a thread for each vector of (rows, dim) elements, or the largest grid there is.
Grid grid_for(int64_t rows, int64_t dim, int width) {
  const int64_t vectors = ceil_div(dim, width);
  unsigned x = 1;  // threads along a row: a power of two, so that a block of kThreads is full
  while (x < kThreads && x < vectors) x *= 2;
  const dim3 threads(x, kThreads / x);
  return {dim3(unsigned(std::min(ceil_div(vectors, threads.x), kMaxBlocks)),
               unsigned(std::min(ceil_div(rows, threads.y), kMaxBlocksY))),
          threads};
}

template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads) forward_kernel(const SwiGLUForward args) {
  for_each_vector<kWidth>(args.rows, args.dim, [&](int64_t row, int64_t d) {
    const int64_t count = args.dim - d;
    const auto gate = load<kWidth>(static_cast<const T*>(args.gate) + row * args.gate_stride + d, count);
    const auto up = load<kWidth>(static_cast<const T*>(args.up) + row * args.up_stride + d, count);
    Vector<T, kWidth> y;
    for (int k = 0; k < kWidth; ++k) y.set(k, gate[k] * sigmoid(gate[k]) * up[k]);
    store(static_cast<T*>(args.y) + row * args.dim + d, y, count);
  });
}

// dgate = dy * up * sigmoid(gate) * (1 + gate * (1 - sigmoid(gate))), dup = dy * gate * sigmoid(gate)
template <class T, int kWidth>
__global__ void __launch_bounds__(kThreads) backward_kernel(const SwiGLUBackward args) {
  for_each_vector<kWidth>(args.rows, args.dim, [&](int64_t row, int64_t d) {
    const int64_t count = args.dim - d;
    const auto dy = load<kWidth>(static_cast<const T*>(args.dy) + row * args.dy_stride + d, count);
    const auto gate = load<kWidth>(static_cast<const T*>(args.gate) + row * args.gate_stride + d, count);
    const auto up = load<kWidth>(static_cast<const T*>(args.up) + row * args.up_stride + d, count);
    Vector<T, kWidth> dgate, dup;
    for (int k = 0; k < kWidth; ++k) {
      const float s = sigmoid(gate[k]), silu = gate[k] * s;
      dgate.set(k, dy[k] * up[k] * (s + silu * (1.0f - s)));
      dup.set(k, dy[k] * silu);
    }
    store(static_cast<T*>(args.dgate) + row * args.dim + d, dgate, count);
    store(static_cast<T*>(args.dup) + row * args.dim + d, dup, count);
  });
}

// The same elements as one long row, where no row has a gap after it.
template <class Args>
Args joined(Args args, bool contiguous) {
  if (contiguous) {
    args.dim *= args.rows;
    args.rows = 1;
  }
  return args;
}

}  // namespace

void swiglu_forward(const SwiGLUForward& all, void* stream) {
  const SwiGLUForward args = joined(all, all.gate_stride == all.dim && all.up_stride == all.dim);
  if (args.rows == 0 || args.dim == 0) return;
  with_type(args.dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int kWidth = kFullWidth<T>;
    const bool whole = args.rows == 1 || (args.dim | args.gate_stride | args.up_stride) % kWidth == 0;
    const int width = whole && aligned(args.gate, args.up, args.y) ? kWidth : 1;
    launch("swiglu_forward", grid_for(args.rows, args.dim, width), stream,
           width == 1 ? forward_kernel<T, 1> : forward_kernel<T, kWidth>, args);
  });
}

void swiglu_backward(const SwiGLUBackward& all, void* stream) {
  const bool contiguous = all.dy_stride == all.dim && all.gate_stride == all.dim && all.up_stride == all.dim;
  const SwiGLUBackward args = joined(all, contiguous);
  if (args.rows == 0 || args.dim == 0) return;
  with_type(args.dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int kWidth = kFullWidth<T>;
    const bool whole = args.rows == 1 || (args.dim | args.dy_stride | args.gate_stride | args.up_stride) % kWidth == 0;
    const int width = whole && aligned(args.dy, args.gate, args.up, args.dgate, args.dup) ? kWidth : 1;
    launch("swiglu_backward", grid_for(args.rows, args.dim, width), stream,
           width == 1 ? backward_kernel<T, 1> : backward_kernel<T, kWidth>, args);
  });
}

}  // namespace llmsys::cuda
