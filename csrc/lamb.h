// One LAMB step over a list of tensors: Adam's direction, scaled for each tensor to the length of its weights.
//
//   g = grad * grad_scale                      (1 when null; -g to maximize)
//   m = m + (g - m) * (1 - beta1)              (g - (g - m) * beta1 where beta1 <= 1/2)
//   v = v * beta2 + (1 - beta2) * g * g
//   u = m / bias_correction1 / (sqrt(v) / sqrt(bias_correction2) + eps) + weight_decay * p
//   p = p - lr * |p| / |u| * u                 (|p| and |u| of the whole tensor; their ratio is 1 where either is 0)
//
// p is `master` where there is one, and `param` is then written as its rounding; else p is `param` itself.
// Source: You et al. 2019, arXiv:1904.00962, algorithm 2, with the identity for phi.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace llmsys {

struct LambTensor {
  void* param;        // (numel,) param_dtype
  const void* grad;   // (numel,) grad_dtype
  float* exp_avg;     // m, (numel,)
  float* exp_avg_sq;  // v, (numel,)
  float* master;      // (numel,) or null
  int64_t numel;
};

struct Lamb {
  const LambTensor* tensors;  // on the host
  int64_t num_tensors;
  double lr, beta1, beta2, eps, weight_decay;
  double bias_correction1, bias_correction2;  // 1 - beta^step
  const float* grad_scale;                    // one element where the tensors are, or null
  bool maximize;
  bool stochastic;  // bfloat16 params without masters are rounded at random, by the words of `seed`
  int64_t seed;
  DType param_dtype, grad_dtype;
};

namespace cpu {
void lamb(const Lamb& args);
}  // namespace cpu

}  // namespace llmsys
