#include "../linear.h"

#include "activation.h"
#include "dispatch.h"
#include "gemm.h"
#include "parallel.h"
#include "simd.h"

namespace llmsys::cpu::LLMSYS_ISA {
namespace {

// ---- forward: what happens to a tile of x weight^T before it is written ----

template <class T, class F>
void finish(const LinearForward& args, const Tile& tile) {
  const T* bias = static_cast<const T*>(args.bias);
  const T* residual = static_cast<const T*>(args.residual);
  T* y = static_cast<T*>(args.y);
  T* pre = static_cast<T*>(args.pre);
  for_each_vector(tile, [&](int64_t row, int64_t col, F32 z, int count) {
    if (bias) z = z + load_some(bias + col, count);
    if (pre) store_some(pre + row * args.cols + col, z, count);
    z = F::value(z);
    if (residual) z = z + load_some(residual + row * args.residual_stride + col, count);
    store_some(y + row * args.cols + col, z, count);
  });
}

// ---- backward ----

// dz = dy * slope(pre)
template <class T, class F>
void backward_of_activation(const LinearBackward& args) {
  const T* dy = static_cast<const T*>(args.dy);
  const T* pre = static_cast<const T*>(args.pre);
  T* dz = static_cast<T*>(args.dz);
  parallel_for(args.rows, grain_of(3 * args.cols * int64_t(sizeof(T))), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      for (int64_t col = 0; col < args.cols; col += kLanes) {
        const int count = args.cols - col < kLanes ? int(args.cols - col) : kLanes;
        const int64_t at = row * args.cols + col;
        store_some(
            dz + at,
            load_some(dy + row * args.dy_row_stride + col, count) * F::with_slope(load_some(pre + at, count)).slope,
            count);
      }
  });
}

// dbias = the sum of the rows of dz, in runs and runs of runs, so that rounding errors hardly add up.
template <class T>
void sum_rows(const T* dz, int64_t row_stride, int64_t rows, int64_t cols, T* dbias) {
  constexpr int64_t kRun = 16;
  parallel_for(ceil_div(cols, kLanes), grain_of(rows * kLanes * int64_t(sizeof(T))), [&](int64_t begin, int64_t end) {
    for (int64_t col = begin * kLanes; col < end * kLanes && col < cols; col += kLanes) {
      const int count = cols - col < kLanes ? int(cols - col) : kLanes;
      F32 total = {}, runs = {}, run = {};
      for (int64_t row = 0; row < rows; ++row) {
        run = run + load_some(dz + row * row_stride + col, count);
        if (row % kRun == kRun - 1) {
          runs = runs + run;
          run = F32{};
        }
        if (row % (kRun * kRun) == kRun * kRun - 1) {
          total = total + runs;
          runs = F32{};
        }
      }
      store_some(dbias + col, total + (runs + run), count);
    }
  });
}

}  // namespace

void linear_forward(const LinearForward& args) {
  const Operand x = {args.x, args.dtype, args.x_row_stride, args.x_col_stride};
  const Operand weight = {args.weight, args.dtype, args.weight_row_stride, args.weight_col_stride};
  with_type(args.dtype, [&](auto element) {
    with_activation(args.activation, [&](auto function) {
      gemm(args.rows, args.cols, args.depth, x, weight,
           [&](const Tile& tile) { finish<decltype(element), decltype(function)>(args, tile); });
    });
  });
}

void linear_backward(const LinearBackward& args) {
  const int64_t rows = args.rows, cols = args.cols, depth = args.depth;
  const bool activated = args.activation != Activation::none;
  const void* dz = activated ? args.dz : args.dy;
  const int64_t row_stride = activated ? cols : args.dy_row_stride, col_stride = activated ? 1 : args.dy_col_stride;
  with_type(args.dtype, [&](auto element) {
    using T = decltype(element);
    if (activated)
      with_activation(args.activation, [&](auto function) { backward_of_activation<T, decltype(function)>(args); });
    const Store<T> dx = {static_cast<T*>(args.dx), depth}, dweight = {static_cast<T*>(args.dweight), depth};
    if (args.dx)
      gemm(rows, depth, cols, {dz, args.dtype, row_stride, col_stride},
           {args.weight, args.dtype, args.weight_col_stride, args.weight_row_stride}, dx, dx.wanted());
    if (args.dweight)
      gemm(cols, depth, rows, {dz, args.dtype, col_stride, row_stride},
           {args.x, args.dtype, args.x_col_stride, args.x_row_stride}, dweight, dweight.wanted());
    if (args.dbias) sum_rows(static_cast<const T*>(dz), row_stride, rows, cols, static_cast<T*>(args.dbias));
  });
}

}  // namespace llmsys::cpu::LLMSYS_ISA

LLMSYS_DISPATCH(linear_forward, LinearForward)
LLMSYS_DISPATCH(linear_backward, LinearBackward)
