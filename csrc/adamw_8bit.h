// One AdamW step over a list of tensors whose moments are kept in 8 bits, in one pass over memory.
//
// The moments of each kAdamW8bitBlock elements, the last of a tensor maybe fewer, are codes of dynamic_map.h times one
// scale. A step decodes them, updates as adamw.h says, and encodes the new ones:
//
//   scale = the block's largest magnitude, at least 2^-126; NaN if one is NaN or infinite, all codes then being 0's
//   code  = the nearest to moment / scale
//
// Source: Dettmers et al. 2021, arXiv:2110.02861.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace llmsys {

constexpr int64_t kAdamW8bitBlock = 256;

struct AdamW8bitTensor {
  void* param;              // (numel,) param_dtype
  const void* grad;         // (numel,) grad_dtype
  uint8_t* exp_avg;         // m, signed codes (numel,)
  uint8_t* exp_avg_sq;      // v, unsigned codes (numel,)
  float* exp_avg_scale;     // one for each block
  float* exp_avg_sq_scale;  // one for each block
  float* master;            // (numel,) or null
  int64_t numel;
};

struct AdamW8bit {
  const AdamW8bitTensor* tensors;  // on the host
  int64_t num_tensors;
  double lr, beta1, beta2, eps, weight_decay;
  double bias_correction1, bias_correction2;  // 1 - beta^step
  const float* grad_scale;                    // one element where the tensors are, or null
  bool maximize;
  DType param_dtype, grad_dtype;
};

namespace cpu {
void adamw_8bit(const AdamW8bit& args);
}  // namespace cpu

namespace cuda {
void adamw_8bit(const AdamW8bit& args, void* stream);
}  // namespace cuda

}  // namespace llmsys
