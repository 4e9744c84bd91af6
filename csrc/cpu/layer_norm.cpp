#include "../layer_norm.h"

#include "../rows.h"
#include "dispatch.h"
#include "moments.h"
#include "norm.h"
#include "stream.h"

namespace llmsys::cpu::LLMSYS_ISA {
namespace {

template <bool kStream, class T, class W>
void forward(const LayerNormForward& args) {
  const T* x = static_cast<const T*>(args.x);
  const T* residual = static_cast<const T*>(args.residual);
  T* sum = static_cast<T*>(args.sum);
  T* y = static_cast<T*>(args.y);
  const Columns<W> weight{static_cast<const W*>(args.weight), 1.0f}, bias{static_cast<const W*>(args.bias), 0.0f};
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
      const Centre centre(mean_of(s, dim));
      const float rstd = float(1.0 / __builtin_sqrt(variance_of(s, dim, centre) + double(args.eps)));
      if (args.mean) args.mean[row] = centre.mean, args.rstd[row] = rstd;
      const int64_t next_row = row + (row + 1 < end && fits);
      const T* next = x + row_start(next_row, args.inner, args.x_stride, args.x_outer_stride);
      normalise_row<kStream>(s, y + row * dim, dim, centre, rstd, weight, bias, next);
    }
    if (kStream) stream_fence();
  });
}

// What one row's gradient needs, and the two means that make it orthogonal to the row and to a constant.
struct RowStatistics {
  float mean, rstd;
  float mean_gradient, mean_projection;  // of dy * w, and of dy * w * xhat
};

template <class T, class W>
RowStatistics statistics_of(const LayerNormBackward& args, const T* dy, const T* s, int64_t row) {
  constexpr Order kOrder = order_of<T>;
  const Columns<W> weight{static_cast<const W*>(args.weight), 1.0f};
  const float mean = args.mean[row], rstd = args.rstd[row];
  auto xhat_of = [&](F32 v) { return (v - mean) * rstd; };
  double sums[2];
  sums_over<2>(
      args.dim, sums,
      [&](int64_t d, Block* sums) {
        Block g = load_block<kOrder>(dy + d), w = weight.template block<kOrder>(d);
        Block xhat = each_half(xhat_of, load_block<kOrder>(s + d));
        Block weighted = {g.first * w.first, g.second * w.second};
        sums[0] = {sums[0].first + weighted.first, sums[0].second + weighted.second};
        sums[1] = {multiply_add(weighted.first, xhat.first, sums[1].first),
                   multiply_add(weighted.second, xhat.second, sums[1].second)};
      },
      [&](int64_t d, int count, F32* terms) {
        terms[0] = load(dy + d, count) * weight.part(d, count);  // zero beyond `count`, as dy is
        terms[1] = terms[0] * xhat_of(load(s + d, count));
      });
  const double dim = double(args.dim);
  return {mean, rstd, float(sums[0] / dim), float(sums[1] / dim)};
}

// dx = rstd * (dy * w - mean(dy * w) - xhat * mean(dy * w * xhat)) + dsum of one row, and its share of dweight and
// dbias, whose parts are in the order of T's blocks.
template <bool kStream, class T, class W>
void backward_row(const LayerNormBackward& args, int64_t chunk, int64_t row, int64_t next) {
  constexpr Order kOrder = order_of<T>;
  const int64_t dim = args.dim;
  const Columns<W> weight{static_cast<const W*>(args.weight), 1.0f};
  auto dy_start = [&](int64_t row) { return row_start(row, args.inner, args.dy_stride, args.dy_outer_stride); };
  auto s_start = [&](int64_t row) { return row_start(row, args.inner, args.s_stride, args.s_outer_stride); };
  const T* dy = static_cast<const T*>(args.dy) + dy_start(row);
  const T* s = static_cast<const T*>(args.s) + s_start(row);
  const T* dsum = static_cast<const T*>(args.dsum);
  if (dsum) dsum += row_start(row, args.inner, args.dsum_stride, args.dsum_outer_stride);
  const T* next_dy = static_cast<const T*>(args.dy) + dy_start(next);
  const T* next_s = static_cast<const T*>(args.s) + s_start(next);
  T* dx = static_cast<T*>(args.dx) + row * dim;
  float* dweight = args.dweight_parts ? args.dweight_parts + chunk * dim : nullptr;
  float* dbias = args.dbias_parts ? args.dbias_parts + chunk * dim : nullptr;
  const RowStatistics row_is = statistics_of<T, W>(args, dy, s, row);
  auto xhat_of = [&](F32 v) { return (v - row_is.mean) * row_is.rstd; };
  auto gradient = [&](F32 g, F32 w, F32 xhat) {
    // The first product is rounded, as in its mean: where all are alike, their difference is zero.
    return multiply_add(xhat, -row_is.mean_projection, g * w - row_is.mean_gradient) * row_is.rstd;
  };
  auto add = [](float* to, Block more) {
    store(to, load(to) + more.first);
    store(to + kLanes, load(to + kLanes) + more.second);
  };
  for_each_pair(
      dim,
      [&](int64_t d) {
        prefetch(next_dy + d);
        prefetch(next_s + d);
        Block g = load_block<kOrder>(dy + d), xhat = each_half(xhat_of, load_block<kOrder>(s + d));
        if (dweight) {
          store(dweight + d, multiply_add(g.first, xhat.first, load(dweight + d)));
          store(dweight + d + kLanes, multiply_add(g.second, xhat.second, load(dweight + d + kLanes)));
        }
        if (dbias) add(dbias + d, g);
        Block out = each_half(gradient, g, weight.template block<kOrder>(d), xhat);
        if (dsum) {
          Block direct = load_block<kOrder>(dsum + d);
          out = {out.first + direct.first, out.second + direct.second};
        }
        store_block<kOrder, kStream>(dx + d, out);
      },
      [&](int64_t d, int count) {
        F32 g = load(dy + d, count), xhat = xhat_of(load(s + d, count));
        if (dweight) store(dweight + d, multiply_add(g, xhat, load(dweight + d, count)), count);
        if (dbias) store(dbias + d, load(dbias + d, count) + g, count);
        F32 out = gradient(g, weight.part(d, count), xhat);
        if (dsum) out = out + load(dsum + d, count);
        store(dx + d, out, count);
      });
}

template <bool kStream, class T, class W>
void backward(const LayerNormBackward& args) {
  const int64_t dim = args.dim, rows = args.rows, chunks = args.chunks;
  const bool fits = prefetchable<T>(dim);
  // The runs of rows are the same however many threads share them, so the bits of dweight and dbias are too.
  const int64_t grain = grain_of(3 * (rows / chunks) * dim * sizeof(T));
  parallel_for(chunks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      if (args.dweight) memset(args.dweight_parts + chunk * dim, 0, dim * sizeof(float));
      if (args.dbias) memset(args.dbias_parts + chunk * dim, 0, dim * sizeof(float));
      for (int64_t row = rows * chunk / chunks, last = rows * (chunk + 1) / chunks; row < last; ++row)
        backward_row<kStream, T, W>(args, chunk, row, row + (fits && row + 1 < last));
    }
    if (kStream) stream_fence();
  });
  if (args.dweight) sum_partials<T>(args.dweight_parts, chunks, dim, static_cast<W*>(args.dweight));
  if (args.dbias) sum_partials<T>(args.dbias_parts, chunks, dim, static_cast<W*>(args.dbias));
}

}  // namespace

void layer_norm_forward(const LayerNormForward& args) {
  with_types(args.dtype, args.weight_dtype, [&](auto x, auto weight) {
    using T = decltype(x);
    using W = decltype(weight);
    worth_streaming<T>(args.rows, args.dim, args.y) ? forward<true, T, W>(args) : forward<false, T, W>(args);
  });
}

void layer_norm_backward(const LayerNormBackward& args) {
  with_types(args.dtype, args.weight_dtype, [&](auto x, auto weight) {
    using T = decltype(x);
    using W = decltype(weight);
    worth_streaming<T>(args.rows, args.dim, args.dx) ? backward<true, T, W>(args) : backward<false, T, W>(args);
  });
}

}  // namespace llmsys::cpu::LLMSYS_ISA

LLMSYS_DISPATCH(layer_norm_forward, LayerNormForward)
LLMSYS_DISPATCH(layer_norm_backward, LayerNormBackward)
