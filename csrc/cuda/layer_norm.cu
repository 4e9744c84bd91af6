#include "../layer_norm.h"

#include "norm.cuh"

namespace llmsys::cuda {
namespace {

// Vectors of a row that a thread keeps in registers, so that it reads them once. The backward keeps twice as many
// values and two sums beside them.
constexpr int kHeldForward = 4, kHeldBackward = 2;

// A vector of a weight or a bias: `otherwise` where there is none.
template <int kWidth, class W>
__device__ Vector<W, kWidth> columns(const W* values, int64_t v, float otherwise) {
  if (values) return load<kWidth>(values + v * kWidth);
  Vector<W, kWidth> vector;
  for (int k = 0; k < kWidth; ++k) vector.set(k, otherwise);
  return vector;
}

template <class T, class W, int kWidth>
__global__ void __launch_bounds__(kMaxThreads, 1) forward_kernel(const LayerNormForward args) {
  const T* x = static_cast<const T*>(args.x);
  const T* residual = static_cast<const T*>(args.residual);
  const W* weight = static_cast<const W*>(args.weight);
  const W* bias = static_cast<const W*>(args.bias);
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
    float total = 0.0f;
    for_each_vector<kHeld>(vectors, [&](int64_t v, int i) {
      Vector<T, kWidth> s = load<kWidth>(x_row + v * kWidth);
      if (residual) {
        const Vector<T, kWidth> added = load<kWidth>(residual_row + v * kWidth);
        for (int k = 0; k < kWidth; ++k) s.set(k, s[k] + added[k]);
        store(sum + row * args.dim + v * kWidth, s);
      }
      for (int k = 0; k < kWidth; ++k) total += s[k];
      if (i < kHeld) held[i] = s;
    });
    const float mean = row_sum(total) / float(args.dim);
    // A thread reads again what it read or wrote itself: no barrier is needed.
    const T* s_row = residual ? sum + row * args.dim : x_row;
    // What rounding left of the mean, which matters where rows lie far from zero.
    float rest = 0.0f;
    for_each_vector<kHeld>(vectors, [&](int64_t v, int i) {
      const Vector<T, kWidth> s = i < kHeld ? held[i] : load<kWidth>(s_row + v * kWidth);
      for (int k = 0; k < kWidth; ++k) rest += s[k] - mean;
    });
    rest = row_sum(rest) / float(args.dim);
    float squares = 0.0f;
    for_each_vector<kHeld>(vectors, [&](int64_t v, int i) {
      const Vector<T, kWidth> s = i < kHeld ? held[i] : load<kWidth>(s_row + v * kWidth);
      for (int k = 0; k < kWidth; ++k) {
        const float distance = s[k] - mean - rest;
        squares += distance * distance;
      }
    });
    const float rstd = 1.0f / sqrtf(row_sum(squares) / float(args.dim) + args.eps);
    if (args.mean && threadIdx.x == 0 && row < args.rows) args.mean[row] = mean + rest, args.rstd[row] = rstd;
    for_each_vector<kHeld>(vectors, [&](int64_t v, int i) {
      const Vector<T, kWidth> s = i < kHeld ? held[i] : load<kWidth>(s_row + v * kWidth);
      const Vector<W, kWidth> w = columns<kWidth>(weight, v, 1.0f), b = columns<kWidth>(bias, v, 0.0f);
      Vector<T, kWidth> out;
      for (int k = 0; k < kWidth; ++k) out.set(k, (s[k] - mean - rest) * rstd * w[k] + b[k]);
      store(y + row * args.dim + v * kWidth, out);
    });
  }
}

// Block c takes the c-th run of rows, blockDim.y rows at a time, and sums their dweight and dbias into row c of the
// parts. dx = rstd * (dy * w - mean(dy * w) - xhat * mean(dy * w * xhat)) + dsum
template <class T, class W, int kWidth>
__global__ void __launch_bounds__(kMaxThreads, 1) backward_kernel(const LayerNormBackward args) {
  const T* dy = static_cast<const T*>(args.dy);
  const T* dsum = static_cast<const T*>(args.dsum);
  const T* s = static_cast<const T*>(args.s);
  const W* weight = static_cast<const W*>(args.weight);
  T* dx = static_cast<T*>(args.dx);
  float* dweight_parts = args.dweight_parts ? args.dweight_parts + blockIdx.x * args.dim : nullptr;
  float* dbias_parts = args.dbias_parts ? args.dbias_parts + blockIdx.x * args.dim : nullptr;
  const int64_t begin = args.rows * blockIdx.x / args.chunks, end = args.rows * (blockIdx.x + 1) / args.chunks;

  constexpr int kHeld = kHeldBackward;
  // Columns beyond the registers are summed in the parts themselves; then blockDim.y is 1 and the columns are this
  // thread's.
  float dweight[kHeld][kWidth] = {}, dbias[kHeld][kWidth] = {};
  for_each_vector<kHeld>(args.dim / kWidth, [&](int64_t v, int i) {
    if (i < kHeld) return;
    if (dweight_parts) store(dweight_parts + v * kWidth, Vector<float, kWidth>{});
    if (dbias_parts) store(dbias_parts + v * kWidth, Vector<float, kWidth>{});
  });
  for (int64_t first = begin; first < end; first += blockDim.y) {
    const int64_t row = first + threadIdx.y;
    const int64_t vectors = row < end ? args.dim / kWidth : 0;
    const T* dy_row = dy + row_start(row, args.inner, args.dy_stride, args.dy_outer_stride);
    const T* s_row = s + row_start(row, args.inner, args.s_stride, args.s_outer_stride);
    const T* dsum_row = dsum ? dsum + row_start(row, args.inner, args.dsum_stride, args.dsum_outer_stride) : nullptr;
    const float mean = row < end ? args.mean[row] : 0.0f, rstd = row < end ? args.rstd[row] : 0.0f;
    Vector<T, kWidth> held_dy[kHeld], held_s[kHeld];
    float level = 0.0f, along = 0.0f;
    for_each_vector<kHeld>(vectors, [&](int64_t v, int i) {
      const Vector<T, kWidth> g = load<kWidth>(dy_row + v * kWidth), value = load<kWidth>(s_row + v * kWidth);
      const Vector<W, kWidth> w = columns<kWidth>(weight, v, 1.0f);
      for (int k = 0; k < kWidth; ++k) {
        level += g[k] * w[k];
        along += g[k] * w[k] * ((value[k] - mean) * rstd);
      }
      if (i < kHeld) held_dy[i] = g, held_s[i] = value;
    });
    level = row_sum(level) / float(args.dim);
    along = row_sum(along) / float(args.dim);
    for_each_vector<kHeld>(vectors, [&](int64_t v, int i) {
      const Vector<T, kWidth> g = i < kHeld ? held_dy[i] : load<kWidth>(dy_row + v * kWidth);
      const Vector<T, kWidth> value = i < kHeld ? held_s[i] : load<kWidth>(s_row + v * kWidth);
      const Vector<W, kWidth> w = columns<kWidth>(weight, v, 1.0f);
      Vector<T, kWidth> direct{}, out;
      if (dsum) direct = load<kWidth>(dsum_row + v * kWidth);
      for (int k = 0; k < kWidth; ++k) {
        const float xhat = (value[k] - mean) * rstd;
        out.set(k, (g[k] * w[k] - level - xhat * along) * rstd + direct[k]);
        if (i < kHeld) {
          dweight[i][k] += g[k] * xhat;
          dbias[i][k] += g[k];
        } else {
          if (dweight_parts) dweight_parts[v * kWidth + k] += g[k] * xhat;
          if (dbias_parts) dbias_parts[v * kWidth + k] += g[k];
        }
      }
      store(dx + row * args.dim + v * kWidth, out);
    });
  }
  if (dweight_parts) add_up(dweight, dweight_parts, args.dim / kWidth);
  if (dbias_parts) add_up(dbias, dbias_parts, args.dim / kWidth);
}

template <class T, class W, int kWidth>
void forward(const LayerNormForward& args, void* stream) {
  const dim3 threads = threads_for(args.dim / kWidth, kHeldForward, 128);
  const int64_t blocks = std::min(ceil_div(args.rows, threads.y), kMaxBlocks);
  if (blocks > 0)
    launch("layer_norm_forward", {dim3(unsigned(blocks)), threads}, stream, forward_kernel<T, W, kWidth>, args);
}

template <class T, class W, int kWidth>
void backward(const LayerNormBackward& args, void* stream) {
  const Grid grid{dim3(unsigned(args.chunks)), threads_for(args.dim / kWidth, kHeldBackward, 256)};
  if (args.chunks > 0) launch("layer_norm_backward", grid, stream, backward_kernel<T, W, kWidth>, args);
  if (args.dweight)
    sum_chunks("layer_norm_backward: dweight", args.dweight_parts, static_cast<W*>(args.dweight), args.dim, args.chunks,
               stream);
  if (args.dbias)
    sum_chunks("layer_norm_backward: dbias", args.dbias_parts, static_cast<W*>(args.dbias), args.dim, args.chunks,
               stream);
}

}  // namespace

void layer_norm_forward(const LayerNormForward& args, void* stream) {
  with_types(args.dtype, args.weight_dtype, [&](auto x, auto weight) {
    using T = decltype(x);
    using W = decltype(weight);
    constexpr int kWidth = kFullWidth<T>;
    const bool whole = multiples_of<kWidth>(args.dim, args.x_stride, args.x_outer_stride, args.residual_stride,
                                            args.residual_outer_stride);
    const bool vectors = whole && aligned(args.x, args.residual, args.weight, args.bias, args.sum, args.y);
    vectors ? forward<T, W, kWidth>(args, stream) : forward<T, W, 1>(args, stream);
  });
}

void layer_norm_backward(const LayerNormBackward& args, void* stream) {
  with_types(args.dtype, args.weight_dtype, [&](auto x, auto weight) {
    using T = decltype(x);
    using W = decltype(weight);
    constexpr int kWidth = kFullWidth<T>;
    const bool whole = multiples_of<kWidth>(args.dim, args.dy_stride, args.dy_outer_stride, args.dsum_stride,
                                            args.dsum_outer_stride, args.s_stride, args.s_outer_stride);
    const bool vectors =
        whole && aligned(args.dy, args.dsum, args.s, args.weight, args.dx, args.dweight_parts, args.dbias_parts);
    vectors ? backward<T, W, kWidth>(args, stream) : backward<T, W, 1>(args, stream);
  });
}

}  // namespace llmsys::cuda
