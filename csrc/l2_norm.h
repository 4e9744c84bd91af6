// Rows scaled to length one.
//
//   length[r] = sqrt(sum_d(x[r, d]^2));  y[r, d] = x[r, d] / max(length[r], eps)
//
// Source: Henry et al. 2020, arXiv:2010.04245, sec. 3 (queries and keys of attention, per head).
// Rows are contiguous inside and lie as rows.h has it. Outputs are contiguous.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace llmsys {

struct L2NormForward {
  const void* x;  // (rows, dim) dtype
  void* y;        // (rows, dim) dtype
  float* length;  // (rows,), or null when no backward follows
  int64_t rows, dim;
  int64_t inner, x_stride, x_outer_stride;
  float eps;
  DType dtype;
};

struct L2NormBackward {
  const void* dy;       // (rows, dim) dtype
  const void* x;        // (rows, dim) dtype
  const float* length;  // (rows,)
  void* dx;             // (rows, dim) dtype
  int64_t rows, dim;
  int64_t inner, dy_stride, dy_outer_stride, x_stride, x_outer_stride;
  float eps;
  DType dtype;
};

namespace cpu {
void l2_norm_forward(const L2NormForward& args);
void l2_norm_backward(const L2NormBackward& args);
}  // namespace cpu

}  // namespace llmsys
