// RMSNorm, with an optional residual added first.
//
//   s = x + residual (rounded to dtype), or s = x when there is no residual
//   rstd[r] = 1 / sqrt(mean_d(s[r, d]^2) + eps)
//   y[r, d] = s[r, d] * rstd[r] * (weight[d] + weight_offset)
//
// Source: Zhang & Sennrich 2019, arXiv:1910.07467, eq. 4.
// Rows are contiguous inside and lie as rows.h has it. Outputs are contiguous.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace llmsys {

struct RMSNormForward {
  const void* x;         // (rows, dim) dtype
  const void* residual;  // (rows, dim) dtype, or null
  const void* weight;    // (dim,) weight_dtype
  void* sum;             // (rows, dim) dtype; null exactly when residual is
  void* y;               // (rows, dim) dtype
  float* rstd;           // (rows,), or null when no backward follows
  int64_t rows, dim;
  int64_t inner, x_stride, x_outer_stride, residual_stride, residual_outer_stride;
  float eps, weight_offset;
  DType dtype, weight_dtype;  // weight_dtype is dtype or float32
};

// dx is the gradient of s: with a residual, of x and of residual alike.
// dweight is summed in `chunks` runs of consecutive rows, then over the runs in order: the same bits every time.
struct RMSNormBackward {
  const void* dy;    // (rows, dim) dtype
  const void* dsum;  // (rows, dim) dtype: gradient that reaches s directly; or null
  const void* s;     // (rows, dim) dtype
  const void* weight;
  const float* rstd;  // (rows,)
  void* dx;           // (rows, dim) dtype
  void* dweight;      // (dim,) weight_dtype
  float* partial;     // (chunks, dim) scratch
  int64_t rows, dim, chunks;
  int64_t inner, dy_stride, dy_outer_stride, dsum_stride, dsum_outer_stride, s_stride, s_outer_stride;
  float weight_offset;
  DType dtype, weight_dtype;
};

namespace cpu {
void rms_norm_forward(const RMSNormForward& args);
void rms_norm_backward(const RMSNormBackward& args);
}  // namespace cpu

namespace cuda {
void rms_norm_forward(const RMSNormForward& args, void* stream);
void rms_norm_backward(const RMSNormBackward& args, void* stream);
}  // namespace cuda

}  // namespace llmsys
