#include "../rms_norm.h"

#include "../rows.h"
#include "dispatch.h"
#include "norm.h"
#include "stream.h"

namespace llmsys::cpu::LLMSYS_ISA {
namespace {

template <class T>
double sum_of_squares(const T* x, int64_t dim) {
  auto add = [](F32 v, F32 sum) { return multiply_add(v, v, sum); };
  return sum_over(
      dim, [&](int64_t d, Block sum) { return each_half(add, load_block<order_of<T>>(x + d), sum); },
      [&](int64_t d, int count) { return add(load(x + d, count), F32{}); });
}

template <bool kStream, class T, class W>
void scale_row(const T* s, const W* weight, T* y, int64_t dim, float rstd, float weight_offset, const T* next) {
  constexpr Order kOrder = order_of<T>;
  for_each_pair(
      dim,
      [&](int64_t d) {
        prefetch(next + d);
        Block v = load_block<kOrder>(s + d), w = load_block<kOrder>(weight + d);
        store_block<kOrder, kStream>(y + d, {v.first * rstd * (w.first + weight_offset),  //
                                             v.second * rstd * (w.second + weight_offset)});
      },
      [&](int64_t d, int count) {
        store(y + d, load(s + d, count) * rstd * (load(weight + d, count) + weight_offset), count);
      });
}

template <bool kStream, class T, class W>
void forward(const RMSNormForward& args) {
  const T* x = static_cast<const T*>(args.x);
  const T* residual = static_cast<const T*>(args.residual);
  const W* weight = static_cast<const W*>(args.weight);
  T* sum = static_cast<T*>(args.sum);
  T* y = static_cast<T*>(args.y);
  const int64_t dim = args.dim;
  const bool fits = prefetchable<T>(dim);
  parallel_for(args.rows, grain_of(2 * dim * sizeof(T)), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T* s = x + row_start(row, args.inner, args.x_stride, args.x_outer_stride);
      if (residual) {
        const int64_t start = row_start(row, args.inner, args.residual_stride, args.residual_outer_stride);
        add_row(s, residual + start, sum + row * dim, dim);
        s = sum + row * dim;
      }
      const float rstd = float(1.0 / __builtin_sqrt(sum_of_squares(s, dim) / double(dim) + double(args.eps)));
      if (args.rstd) args.rstd[row] = rstd;
      const int64_t next_row = row + (row + 1 < end && fits);
      const T* next = x + row_start(next_row, args.inner, args.x_stride, args.x_outer_stride);
      scale_row<kStream>(s, weight, y + row * dim, dim, rstd, args.weight_offset, next);
    }
    if (kStream) stream_fence();
  });
}

// sum_d(dy * weight * s)
template <class T, class W>
double weighted_dot(const T* dy, const T* s, const W* weight, int64_t dim, float weight_offset) {
  auto add = [&](F32 g, F32 w, F32 v, F32 sum) { return multiply_add(g * (w + weight_offset), v, sum); };
  constexpr Order kOrder = order_of<T>;
  return sum_over(
      dim,
      [&](int64_t d, Block sum) {
        Block g = load_block<kOrder>(dy + d), w = load_block<kOrder>(weight + d), v = load_block<kOrder>(s + d);
        return each_half(add, g, w, v, sum);
      },
      [&](int64_t d, int count) {
        return add(load(dy + d, count), load(weight + d, count), load(s + d, count), F32{});
      });
}

// dx = rstd * (dy * w - s * rstd^2 * mean(dy * w * s)) + dsum of one row, and its share of dweight. A row at a time:
// two would halve the traffic of `partial`, but their lines then fall on the same few sets of the first cache.
// `partial` is in the order of T's blocks.
template <bool kStream, class T, class W>
void backward_row(const RMSNormBackward& args, float* partial, int64_t row, int64_t next) {
  const int64_t dim = args.dim;
  const W* weight = static_cast<const W*>(args.weight);
  auto dy_start = [&](int64_t row) { return row_start(row, args.inner, args.dy_stride, args.dy_outer_stride); };
  auto s_start = [&](int64_t row) { return row_start(row, args.inner, args.s_stride, args.s_outer_stride); };
  const T* dy = static_cast<const T*>(args.dy) + dy_start(row);
  const T* s = static_cast<const T*>(args.s) + s_start(row);
  const T* dsum = static_cast<const T*>(args.dsum);
  if (dsum) dsum += row_start(row, args.inner, args.dsum_stride, args.dsum_outer_stride);
  const T* next_dy = static_cast<const T*>(args.dy) + dy_start(next);
  const T* next_s = static_cast<const T*>(args.s) + s_start(next);
  T* dx = static_cast<T*>(args.dx) + row * dim;
  const float rstd = args.rstd[row], weight_offset = args.weight_offset;
  constexpr Order kOrder = order_of<T>;
  const double wide = rstd;
  const double mean = weighted_dot(dy, s, weight, dim, weight_offset) / double(dim);
  const float projection = float(mean * wide * wide * wide);
  auto gradient = [&](F32 g, F32 w, F32 v) { return multiply_add(v, -projection, g * (w + weight_offset) * rstd); };
  for_each_pair(
      dim,
      [&](int64_t d) {
        prefetch(next_dy + d);
        prefetch(next_s + d);
        Block g = load_block<kOrder>(dy + d), w = load_block<kOrder>(weight + d), v = load_block<kOrder>(s + d);
        store(partial + d, multiply_add(g.first, v.first * rstd, load(partial + d)));
        store(partial + d + kLanes, multiply_add(g.second, v.second * rstd, load(partial + d + kLanes)));
        Block out = each_half(gradient, g, w, v);
        if (dsum) {
          Block more = load_block<kOrder>(dsum + d);
          out = {out.first + more.first, out.second + more.second};
        }
        store_block<kOrder, kStream>(dx + d, out);
      },
      [&](int64_t d, int count) {
        F32 g = load(dy + d, count), v = load(s + d, count);
        store(partial + d, multiply_add(g, v * rstd, load(partial + d, count)), count);
        F32 out = gradient(g, load(weight + d, count), v);
        if (dsum) out = out + load(dsum + d, count);
        store(dx + d, out, count);
      });
}

template <bool kStream, class T, class W>
void backward(const RMSNormBackward& args) {
  W* dweight = static_cast<W*>(args.dweight);
  const int64_t dim = args.dim, rows = args.rows, chunks = args.chunks;
  const bool fits = prefetchable<T>(dim);
  // The runs of rows are the same however many threads share them, so dweight's bits are too.
  const int64_t grain = grain_of(3 * (rows / chunks) * dim * sizeof(T));
  parallel_for(chunks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      float* partial = args.partial + chunk * dim;
      memset(partial, 0, dim * sizeof(float));
      for (int64_t row = rows * chunk / chunks, last = rows * (chunk + 1) / chunks; row < last; ++row)
        backward_row<kStream, T, W>(args, partial, row, row + (fits && row + 1 < last));
    }
    if (kStream) stream_fence();
  });
  sum_partials<T>(args.partial, chunks, dim, dweight);
}

}  // namespace

void rms_norm_forward(const RMSNormForward& args) {
  with_types(args.dtype, args.weight_dtype, [&](auto x, auto weight) {
    using T = decltype(x);
    using W = decltype(weight);
    worth_streaming<T>(args.rows, args.dim, args.y) ? forward<true, T, W>(args) : forward<false, T, W>(args);
  });
}

void rms_norm_backward(const RMSNormBackward& args) {
  with_types(args.dtype, args.weight_dtype, [&](auto x, auto weight) {
    using T = decltype(x);
    using W = decltype(weight);
    worth_streaming<T>(args.rows, args.dim, args.dx) ? backward<true, T, W>(args) : backward<false, T, W>(args);
  });
}

}  // namespace llmsys::cpu::LLMSYS_ISA

LLMSYS_DISPATCH(rms_norm_forward, RMSNormForward)
LLMSYS_DISPATCH(rms_norm_backward, RMSNormBackward)
