#include "../softmax.h"

#include "../rows.h"
#include "dispatch.h"
#include "functions.h"
#include "norm.h"
#include "stream.h"
#include "tensor_list.h"

namespace llmsys::cpu::LLMSYS_ISA {
namespace {

// sum_over in chunks, whose sums are added in double: an error in a sum shifts the whole row to one side.
template <class Add, class Tail>
double sum_in_chunks(int64_t dim, Add add, Tail tail) {
  constexpr int64_t kChunk = 1024;
  double sum = 0;
  for (int64_t start = 0; start < dim; start += kChunk)
    sum += sum_over(
        dim - start < kChunk ? dim - start : kChunk, [&](int64_t d, Block part) { return add(start + d, part); },
        [&](int64_t d, int count) { return tail(start + d, count); });
  return sum;
}

// e^(x - highest) into `e`, in the order of T's blocks, and their sum. NaN and a row of -infinity are NaN throughout.
template <class T>
double exp_row(const T* x, float highest, float* e, int64_t dim) {
  return sum_in_chunks(
      dim,
      [&](int64_t d, Block sum) {
        Block v = load_block<order_of<T>>(x + d), power = exp(Block{v.first - highest, v.second - highest});
        store_pair<false>(e + d, power.first, power.second);
        return Block{sum.first + power.first, sum.second + power.second};
      },
      [&](int64_t d, int count) {
        store(e + d, exp(load(x + d, count) - highest), count);
        return load(e + d, count);
      });
}

template <bool kStream, class T>
void forward(const SoftmaxForward& args) {
  const T* all = static_cast<const T*>(args.x);
  const int64_t dim = args.dim;
  const bool fits = prefetchable<T>(dim);
  parallel_for(args.rows, grain_of(4 * dim * sizeof(T)), [&](int64_t begin, int64_t end) {
    const Scratch<float> e(dim);
    for (int64_t row = begin; row < end; ++row) {
      const T* x = all + row_start(row, args.inner, args.x_stride, args.x_outer_stride);
      T* y = static_cast<T*>(args.y) + row * dim;
      const float scale = float(1.0 / exp_row(x, max_over(x, dim), e.data, dim));
      const int64_t next_row = row + (row + 1 < end && fits);
      const T* next = all + row_start(next_row, args.inner, args.x_stride, args.x_outer_stride);
      for_each_pair(
          dim,
          [&](int64_t d) {
            prefetch(next + d);
            store_block<order_of<T>, kStream>(y + d, {load(e.data + d) * scale, load(e.data + d + kLanes) * scale});
          },
          [&](int64_t d, int count) { store(y + d, load(e.data + d, count) * scale, count); });
    }
    if (kStream) stream_fence();
  });
}

// dx = y * (dy - sum(dy * y))
template <bool kStream, class T>
void backward(const SoftmaxBackward& args) {
  constexpr Order kOrder = order_of<T>;
  const int64_t dim = args.dim;
  parallel_for(args.rows, grain_of(3 * dim * sizeof(T)), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const T* y = static_cast<const T*>(args.y) + row_start(row, args.inner, args.y_stride, args.y_outer_stride);
      const T* dy = static_cast<const T*>(args.dy) + row_start(row, args.inner, args.dy_stride, args.dy_outer_stride);
      T* dx = static_cast<T*>(args.dx) + row * dim;
      auto add = [](F32 g, F32 v, F32 sum) { return multiply_add(g, v, sum); };
      const float mean = float(sum_in_chunks(
          dim,
          [&](int64_t d, Block sum) {
            return each_half(add, load_block<kOrder>(dy + d), load_block<kOrder>(y + d), sum);
          },
          [&](int64_t d, int count) { return add(load(dy + d, count), load(y + d, count), F32{}); }));
      auto gradient = [&](F32 g, F32 v) { return v * (g - mean); };
      for_each_pair(
          dim,
          [&](int64_t d) {
            store_block<kOrder, kStream>(dx + d,
                                         each_half(gradient, load_block<kOrder>(dy + d), load_block<kOrder>(y + d)));
          },
          [&](int64_t d, int count) { store(dx + d, gradient(load(dy + d, count), load(y + d, count)), count); });
    }
    if (kStream) stream_fence();
  });
}

}  // namespace

void softmax_forward(const SoftmaxForward& args) {
  with_type(args.dtype, [&](auto x) {
    using T = decltype(x);
    worth_streaming<T>(args.rows, args.dim, args.y) ? forward<true, T>(args) : forward<false, T>(args);
  });
}

void softmax_backward(const SoftmaxBackward& args) {
  with_type(args.dtype, [&](auto x) {
    using T = decltype(x);
    worth_streaming<T>(args.rows, args.dim, args.dx) ? backward<true, T>(args) : backward<false, T>(args);
  });
}

}  // namespace llmsys::cpu::LLMSYS_ISA

LLMSYS_DISPATCH(softmax_forward, SoftmaxForward)
LLMSYS_DISPATCH(softmax_backward, SoftmaxBackward)
