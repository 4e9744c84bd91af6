// LayerNorm, with an optional residual added first.
//
//   s = x + residual (rounded to dtype), or s = x when there is no residual
//   mean[r] = mean_d(s[r, d]);  rstd[r] = 1 / sqrt(mean_d((s[r, d] - mean[r])^2) + eps)
//   y[r, d] = (s[r, d] - mean[r]) * rstd[r] * weight[d] + bias[d], without what is null
//
// Source: Ba, Kiros & Hinton 2016, arXiv:1607.06450, eq. 4.
// Rows are contiguous inside and lie as rows.h has it. Outputs are contiguous.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace llmsys {

struct LayerNormForward {
  const void* x;         // (rows, dim) dtype
  const void* residual;  // (rows, dim) dtype, or null
  const void* weight;    // (dim,) weight_dtype, or null
  const void* bias;      // (dim,) weight_dtype, or null
  void* sum;             // (rows, dim) dtype; null exactly when residual is
  void* y;               // (rows, dim) dtype
  float* mean;           // (rows,), or null when no backward follows
  float* rstd;           // (rows,); null exactly when mean is
  int64_t rows, dim;
  int64_t inner, x_stride, x_outer_stride, residual_stride, residual_outer_stride;
  float eps;
  DType dtype, weight_dtype;  // weight_dtype is dtype or float32
};

// dx is the gradient of s: with a residual, of x and of residual alike.
// dweight and dbias are summed in `chunks` runs of consecutive rows, then over the runs in order: the same bits every
// time.
struct LayerNormBackward {
  const void* dy;    // (rows, dim) dtype
  const void* dsum;  // (rows, dim) dtype: gradient that reaches s directly; or null
  const void* s;     // (rows, dim) dtype
  const void* weight;
  const float* mean;     // (rows,)
  const float* rstd;     // (rows,)
  void* dx;              // (rows, dim) dtype
  void* dweight;         // (dim,) weight_dtype, or null
  void* dbias;           // (dim,) weight_dtype, or null
  float* dweight_parts;  // (chunks, dim) scratch; null exactly when dweight is
  float* dbias_parts;    // (chunks, dim) scratch; null exactly when dbias is
  int64_t rows, dim, chunks;
  int64_t inner, dy_stride, dy_outer_stride, dsum_stride, dsum_outer_stride, s_stride, s_outer_stride;
  DType dtype, weight_dtype;
};

namespace cpu {
void layer_norm_forward(const LayerNormForward& args);
void layer_norm_backward(const LayerNormBackward& args);
}  // namespace cpu

namespace cuda {
void layer_norm_forward(const LayerNormForward& args, void* stream);
void layer_norm_backward(const LayerNormBackward& args, void* stream);
}  // namespace cuda

}  // namespace llmsys
