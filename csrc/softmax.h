// Softmax of rows.
//
//   y[r, d] = e^(x[r, d] - max_d(x[r, d])) / sum_d(e^(x[r, d] - max_d(x[r, d])))
//
// Source: Bridle 1990, doi:10.1007/978-3-642-76153-9_28, less the row's maximum, so that nothing overflows.
// Rows are contiguous inside and lie as rows.h has it. Outputs are contiguous.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace llmsys {

struct SoftmaxForward {
  const void* x;  // (rows, dim) dtype
  void* y;        // (rows, dim) dtype
  int64_t rows, dim;
  int64_t inner, x_stride, x_outer_stride;
  DType dtype;
};

struct SoftmaxBackward {
  const void* dy;  // (rows, dim) dtype
  const void* y;   // (rows, dim) dtype
  void* dx;        // (rows, dim) dtype
  int64_t rows, dim;
  int64_t inner, dy_stride, dy_outer_stride, y_stride, y_outer_stride;
  DType dtype;
};

namespace cpu {
void softmax_forward(const SoftmaxForward& args);
void softmax_backward(const SoftmaxBackward& args);
}  // namespace cpu

}  // namespace llmsys
