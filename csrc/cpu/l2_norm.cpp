#include "../l2_norm.h"

#include "../rows.h"
#include "dispatch.h"
#include "norm.h"
#include "stream.h"

namespace llmsys::cpu::LLMSYS_ISA {
namespace {

// The sum over two rows of a * (b * scale).
template <class T>
double dot(const T* a, const T* b, float scale, int64_t dim) {
  constexpr Order kOrder = order_of<T>;
  auto add = [&](F32 u, F32 v, F32 sum) { return multiply_add(u, v * scale, sum); };
  return sum_over(
      dim,
      [&](int64_t d, Block sum) { return each_half(add, load_block<kOrder>(a + d), load_block<kOrder>(b + d), sum); },
      [&](int64_t d, int count) { return add(load(a + d, count), load(b + d, count), F32{}); });
}

template <bool kStream, class T>
void forward(const L2NormForward& args) {
  constexpr Order kOrder = order_of<T>;
  const T* all = static_cast<const T*>(args.x);
  const int64_t dim = args.dim;
  parallel_for(args.rows, grain_of(2 * dim * sizeof(T)), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T* x = all + row_start(row, args.inner, args.x_stride, args.x_outer_stride);
      T* y = static_cast<T*>(args.y) + row * dim;
      const float length = float(__builtin_sqrt(dot(x, x, 1.0f, dim)));
      if (args.length) args.length[row] = length;
      const float scale = 1.0f / (length < args.eps ? args.eps : length);  // a NaN stays
      auto scaled = [&](F32 v) { return v * scale; };
      for_each_pair(
          dim, [&](int64_t d) { store_block<kOrder, kStream>(y + d, each_half(scaled, load_block<kOrder>(x + d))); },
          [&](int64_t d, int count) { store(y + d, scaled(load(x + d, count)), count); });
    }
    if (kStream) stream_fence();
  });
}

// dx = (dy - y * sum(dy * y)) * scale; dy / eps of a row shorter than eps, whose length does not matter.
template <bool kStream, class T>
void backward(const L2NormBackward& args) {
  constexpr Order kOrder = order_of<T>;
  const int64_t dim = args.dim;
  parallel_for(args.rows, grain_of(3 * dim * sizeof(T)), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T* x = static_cast<const T*>(args.x) + row_start(row, args.inner, args.x_stride, args.x_outer_stride);
      const T* dy = static_cast<const T*>(args.dy) + row_start(row, args.inner, args.dy_stride, args.dy_outer_stride);
      T* dx = static_cast<T*>(args.dx) + row * dim;
      const bool is_short = args.length[row] < args.eps;
      const float scale = 1.0f / (is_short ? args.eps : args.length[row]);
      const float along = is_short ? 0.0f : float(dot(dy, x, scale, dim));
      auto gradient = [&](F32 g, F32 v) { return multiply_add(v * scale, -along, g) * scale; };
      for_each_pair(
          dim,
          [&](int64_t d) {
            store_block<kOrder, kStream>(dx + d,
                                         each_half(gradient, load_block<kOrder>(dy + d), load_block<kOrder>(x + d)));
          },
          [&](int64_t d, int count) { store(dx + d, gradient(load(dy + d, count), load(x + d, count)), count); });
    }
    if (kStream) stream_fence();
  });
}

}  // namespace

void l2_norm_forward(const L2NormForward& args) {
  with_type(args.dtype, [&](auto x) {
    using T = decltype(x);
    worth_streaming<T>(args.rows, args.dim, args.y) ? forward<true, T>(args) : forward<false, T>(args);
  });
}

void l2_norm_backward(const L2NormBackward& args) {
  with_type(args.dtype, [&](auto x) {
    using T = decltype(x);
    worth_streaming<T>(args.rows, args.dim, args.dx) ? backward<true, T>(args) : backward<false, T>(args);
  });
}

}  // namespace llmsys::cpu::LLMSYS_ISA

LLMSYS_DISPATCH(l2_norm_forward, L2NormForward)
LLMSYS_DISPATCH(l2_norm_backward, L2NormBackward)
