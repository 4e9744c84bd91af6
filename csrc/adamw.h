// One AdamW step over a list of tensors, in one pass over memory.
//
//   g = grad * grad_scale                      (unscaling and clipping; 1 when null; -g to maximize)
//   p = p * (1 - lr * weight_decay)            (decoupled weight decay)
//   m = m + (g - m) * (1 - beta1)              (g - (g - m) * beta1 where beta1 <= 1/2: torch.lerp's two forms)
//   v = v * beta2 + (1 - beta2) * g * g
//   p = p - lr / bias_correction1 * m / (sqrt(v) / sqrt(bias_correction2) + eps)
//
// p is `master` where there is one, and `param` is then written as its rounding; else p is `param` itself.
// Source: Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2, in the form torch.optim.AdamW computes it.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace llmsys {

struct AdamWTensor {
  void* param;        // (numel,) param_dtype
  const void* grad;   // (numel,) grad_dtype
  float* exp_avg;     // m, (numel,)
  float* exp_avg_sq;  // v, (numel,)
  float* master;      // (numel,) or null
  int64_t numel;
};

struct AdamW {
  const AdamWTensor* tensors;  // on the host
  int64_t num_tensors;
  double lr, beta1, beta2, eps, weight_decay;
  double bias_correction1, bias_correction2;  // 1 - beta^step
  const float* grad_scale;                    // one element where the tensors are, or null
  bool maximize;
  bool stochastic;  // bfloat16 params without masters are rounded at random, by the words of `seed` (CPU only)
  int64_t seed;
  DType param_dtype, grad_dtype;
};

namespace cpu {
void adamw(const AdamW& args);
}  // namespace cpu

namespace cuda {
void adamw(const AdamW& args, void* stream);
}  // namespace cuda

}  // namespace llmsys
