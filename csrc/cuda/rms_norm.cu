#include "../rms_norm.h"

#include "norm.cuh"

namespace llmsys::cuda {
namespace {

// Vectors of a row that a thread keeps in registers, so that it reads them once. The backward keeps twice as many
// values and the sums beside them.
constexpr int kHeldForward = 4, kHeldBackward = 2;

template <class T, class W, int kWidth>
__global__ void __launch_bounds__(kMaxThreads, 1) forward_kernel(const RMSNormForward args) {
  const T* x = static_cast<const T*>(args.x);
  const T* residual = static_cast<const T*>(args.residual);
  const W* weight = static_cast<const W*>(args.weight);
  T* sum = static_cast<T*>(args.sum);
  T* y = static_cast<T*>(args.y);
  constexpr int kHeld = kHeldForward;
  for (int64_t first = int64_t(blockIdx.x) * blockDim.y; first < args.rows; first += int64_t(gridDim.x) * blockDim.y) {
    const int64_t row = first + threadIdx.y;
    const int64_t vectors = row < args.rows ? args.dim / kWidth : 0;
    const T* x_row = x + row_start(row, args.inner, args.x_stride, args.x_outer_stride);
    const T* residual_row =
        residual ? residual + row_start(row, args.inner, args.residual_stride, args.residual_outer_stride) : nullptr;
    Vector<T, kWidth> held[kHeld];
    float squares = 0.0f;
    for_each_vector<kHeld>(vectors, [&](int64_t v, int i) {
      Vector<T, kWidth> s = load<kWidth>(x_row + v * kWidth);
      if (residual) {
        const Vector<T, kWidth> added = load<kWidth>(residual_row + v * kWidth);
        for (int k = 0; k < kWidth; ++k) s.set(k, s[k] + added[k]);
        store(sum + row * args.dim + v * kWidth, s);
      }
      for (int k = 0; k < kWidth; ++k) squares += s[k] * s[k];
      if (i < kHeld) held[i] = s;
    });
    const float rstd = 1.0f / sqrtf(row_sum(squares) / float(args.dim) + args.eps);
    if (args.rstd && threadIdx.x == 0 && row < args.rows) args.rstd[row] = rstd;
    // A thread reads again what it read or wrote itself: no barrier is needed.
    const T* s_row = residual ? sum + row * args.dim : x_row;
    for_each_vector<kHeld>(vectors, [&](int64_t v, int i) {
      const Vector<T, kWidth> s = i < kHeld ? held[i] : load<kWidth>(s_row + v * kWidth);
      const Vector<W, kWidth> w = load<kWidth>(weight + v * kWidth);
      Vector<T, kWidth> out;
      for (int k = 0; k < kWidth; ++k) out.set(k, s[k] * rstd * (w[k] + args.weight_offset));
      store(y + row * args.dim + v * kWidth, out);
    });
  }
}

// Block c takes the c-th run of rows, blockDim.y rows at a time, and sums their dweight into row c of `partial`.
// dx = rstd * (dy * w - s * rstd^2 * mean(dy * w * s)) + dsum
template <class T, class W, int kWidth>
__global__ void __launch_bounds__(kMaxThreads, 1) backward_kernel(const RMSNormBackward args) {
  const T* dy = static_cast<const T*>(args.dy);
  const T* dsum = static_cast<const T*>(args.dsum);
  const T* s = static_cast<const T*>(args.s);
  const W* weight = static_cast<const W*>(args.weight);
  T* dx = static_cast<T*>(args.dx);
  float* partial = args.partial + blockIdx.x * args.dim;
  const int64_t begin = args.rows * blockIdx.x / args.chunks, end = args.rows * (blockIdx.x + 1) / args.chunks;

  constexpr int kHeld = kHeldBackward;
  // Columns beyond the registers are summed in `partial` itself; then blockDim.y is 1 and the columns are this
  // thread's.
  float dweight[kHeld][kWidth] = {};
  for_each_vector<kHeld>(args.dim / kWidth, [&](int64_t v, int i) {
    if (i == kHeld) store(partial + v * kWidth, Vector<float, kWidth>{});
  });
  for (int64_t first = begin; first < end; first += blockDim.y) {
    const int64_t row = first + threadIdx.y;
    const int64_t vectors = row < end ? args.dim / kWidth : 0;
    const T* dy_row = dy + row_start(row, args.inner, args.dy_stride, args.dy_outer_stride);
    const T* s_row = s + row_start(row, args.inner, args.s_stride, args.s_outer_stride);
    const T* dsum_row = dsum ? dsum + row_start(row, args.inner, args.dsum_stride, args.dsum_outer_stride) : nullptr;
    Vector<T, kWidth> held_dy[kHeld], held_s[kHeld];
    float dot = 0.0f;
    for_each_vector<kHeld>(vectors, [&](int64_t v, int i) {
      const Vector<T, kWidth> g = load<kWidth>(dy_row + v * kWidth), value = load<kWidth>(s_row + v * kWidth);
      const Vector<W, kWidth> w = load<kWidth>(weight + v * kWidth);
      for (int k = 0; k < kWidth; ++k) dot += g[k] * (w[k] + args.weight_offset) * value[k];
      if (i < kHeld) held_dy[i] = g, held_s[i] = value;
    });
    const float rstd = row < end ? args.rstd[row] : 0.0f;
    const float projection = row_sum(dot) / float(args.dim) * rstd * rstd * rstd;
    for_each_vector<kHeld>(vectors, [&](int64_t v, int i) {
      const Vector<T, kWidth> g = i < kHeld ? held_dy[i] : load<kWidth>(dy_row + v * kWidth);
      const Vector<T, kWidth> value = i < kHeld ? held_s[i] : load<kWidth>(s_row + v * kWidth);
      const Vector<W, kWidth> w = load<kWidth>(weight + v * kWidth);
      Vector<T, kWidth> direct{}, out;
      if (dsum) direct = load<kWidth>(dsum_row + v * kWidth);
      for (int k = 0; k < kWidth; ++k) {
        out.set(k, g[k] * (w[k] + args.weight_offset) * rstd - value[k] * projection + direct[k]);
        float& total = i < kHeld ? dweight[i][k] : partial[v * kWidth + k];
        total += g[k] * (value[k] * rstd);
      }
      store(dx + row * args.dim + v * kWidth, out);
    });
  }
  add_up(dweight, partial, args.dim / kWidth);
}

template <class T, class W, int kWidth>
void forward(const RMSNormForward& args, void* stream) {
  const dim3 threads = threads_for(args.dim / kWidth, kHeldForward, 128);
  const int64_t blocks = std::min(ceil_div(args.rows, threads.y), kMaxBlocks);
  if (blocks > 0)
    launch("rms_norm_forward", {dim3(unsigned(blocks)), threads}, stream, forward_kernel<T, W, kWidth>, args);
}

template <class T, class W, int kWidth>
void backward(const RMSNormBackward& args, void* stream) {
  const Grid grid{dim3(unsigned(args.chunks)), threads_for(args.dim / kWidth, kHeldBackward, 256)};
  if (args.chunks > 0) launch("rms_norm_backward", grid, stream, backward_kernel<T, W, kWidth>, args);
  sum_chunks("rms_norm_backward: sum of chunks", args.partial, static_cast<W*>(args.dweight), args.dim, args.chunks,
             stream);
}

}  // namespace

void rms_norm_forward(const RMSNormForward& args, void* stream) {
  with_types(args.dtype, args.weight_dtype, [&](auto x, auto weight) {
    using T = decltype(x);
    using W = decltype(weight);
    constexpr int kWidth = kFullWidth<T>;
    const bool whole = multiples_of<kWidth>(args.dim, args.x_stride, args.x_outer_stride, args.residual_stride,
                                            args.residual_outer_stride);
    const bool vectors = whole && aligned(args.x, args.residual, args.weight, args.sum, args.y);
    vectors ? forward<T, W, kWidth>(args, stream) : forward<T, W, 1>(args, stream);
  });
}

void rms_norm_backward(const RMSNormBackward& args, void* stream) {
  with_types(args.dtype, args.weight_dtype, [&](auto x, auto weight) {
    using T = decltype(x);
    using W = decltype(weight);
    constexpr int kWidth = kFullWidth<T>;
    const bool whole = multiples_of<kWidth>(args.dim, args.dy_stride, args.dy_outer_stride, args.dsum_stride,
                                            args.dsum_outer_stride, args.s_stride, args.s_outer_stride);
    const bool vectors = whole && aligned(args.dy, args.dsum, args.s, args.weight, args.dx, args.partial);
    vectors ? backward<T, W, kWidth>(args, stream) : backward<T, W, 1>(args, stream);
  });
}

}  // namespace llmsys::cuda
