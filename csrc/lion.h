// One Lion step over a list of tensors, in one pass over memory.
//
//   g = grad * grad_scale                        (1 when null; -grad to maximize)
//   c = beta1 * m + (1 - beta1) * g
//   p = p * (1 - lr * weight_decay) - lr * sign(c)
//   m = beta2 * m + (1 - beta2) * g
//
// p is `master` where there is one, and `param` is then written as its rounding; else p is `param` itself.
// Source: Chen et al. 2023, arXiv:2302.06675, algorithm 2.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace llmsys {

struct LionTensor {
  void* param;       // (numel,) param_dtype
  const void* grad;  // (numel,) grad_dtype
  float* exp_avg;    // m, (numel,)
  float* master;     // (numel,) or null
  int64_t numel;
};

struct Lion {
  const LionTensor* tensors;  // on the host
  int64_t num_tensors;
  double lr, beta1, beta2, weight_decay;
  const float* grad_scale;  // one element where the tensors are, or null
  bool maximize;
  bool stochastic;  // bfloat16 params without masters are rounded at random, by the words of `seed` (CPU only)
  int64_t seed;
  DType param_dtype, grad_dtype;
};

namespace cpu {
void lion(const Lion& args);
}  // namespace cpu

}  // namespace llmsys
