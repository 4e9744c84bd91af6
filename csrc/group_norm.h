// GroupNorm: the channels of each sample normalised group by group, then scaled and shifted each by its own.
//
//   mean[n, g], rstd[n, g] over the channels c of group g and all s
//   y[n, c, s] = (x[n, c, s] - mean[n, g]) * rstd[n, g] * weight[c] + bias[c], without what is null
//
// Source: Wu & He 2018, arXiv:1803.08494, eq. 7. All tensors are contiguous.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace llmsys {

struct GroupNormForward {
  const void* x;       // (samples, channels, size) dtype
  const void* weight;  // (channels,) weight_dtype, or null
  const void* bias;    // (channels,) weight_dtype, or null
  void* y;             // (samples, channels, size) dtype
  float* mean;         // (samples, groups), or null when no backward follows
  float* rstd;         // (samples, groups); null exactly when mean is
  int64_t samples, channels, size, groups;
  float eps;
  DType dtype, weight_dtype;  // weight_dtype is dtype or float32
};

// dweight and dbias are summed within each sample, then over the samples in order: the same bits every time.
struct GroupNormBackward {
  const void* dy;  // (samples, channels, size) dtype
  const void* x;   // (samples, channels, size) dtype
  const void* weight;
  const float* mean;      // (samples, groups)
  const float* rstd;      // (samples, groups)
  void* dx;               // (samples, channels, size) dtype
  void* dweight;          // (channels,) weight_dtype, or null
  void* dbias;            // (channels,) weight_dtype, or null
  double* dweight_parts;  // (samples, channels) scratch
  double* dbias_parts;    // (samples, channels) scratch
  int64_t samples, channels, size, groups;
  DType dtype, weight_dtype;
};

namespace cpu {
void group_norm_forward(const GroupNormForward& args);
void group_norm_backward(const GroupNormBackward& args);
}  // namespace cpu

}  // namespace llmsys
