// One step of stochastic gradient descent with momentum over a list of tensors, in one pass over memory.
//
//   g = grad * grad_scale + weight_decay * p     (grad_scale 1 when null; -grad to maximize)
//   b = momentum * b + toward_grad * g           (where there is a buffer; toward_grad is 1 or 1 - dampening)
//   p = p - lr * b                               (Nesterov: lr * (g + momentum * b); without a buffer: lr * g)
//
// p is `master` where there is one, and `param` is then written as its rounding; else p is `param` itself.
// Source: Sutskever et al. 2013, proceedings.mlr.press/v28/sutskever13, in the form torch.optim.SGD computes it.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace llmsys {

struct SgdTensor {
  void* param;             // (numel,) param_dtype
  const void* grad;        // (numel,) grad_dtype
  float* momentum_buffer;  // b, (numel,) or null
  float* master;           // (numel,) or null
  int64_t numel;
};

struct Sgd {
  const SgdTensor* tensors;  // on the host
  int64_t num_tensors;
  double lr, momentum, toward_grad, weight_decay;
  bool nesterov;
  const float* grad_scale;  // one element where the tensors are, or null
  bool maximize;
  bool stochastic;  // bfloat16 params without masters are rounded at random, by the words of `seed` (CPU only)
  int64_t seed;
  DType param_dtype, grad_dtype;
};

namespace cpu {
void sgd(const Sgd& args);
}  // namespace cpu

}  // namespace llmsys
