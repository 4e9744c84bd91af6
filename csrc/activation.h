// Activations of single numbers: y = f(x), computed in float32 and rounded once.
// Rows are contiguous inside; `*_stride` is the distance between rows, in elements. Outputs are contiguous.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace llmsys {

// The numbers are shared with llmsys/ops/_activation_native.py and llmsys/ops/linear/native.py.
enum class Activation : int { none = 0, relu = 1, relu2 = 2, silu = 3, gelu = 4, gelu_tanh = 5 };

struct ActivationForward {
  const void* x;  // (rows, dim)
  void* y;        // (rows, dim)
  int64_t rows, dim;
  int64_t x_stride;
  Activation activation;
  DType dtype;
};

struct ActivationBackward {
  const void* dy;  // (rows, dim)
  const void* x;   // (rows, dim)
  void* dx;        // (rows, dim)
  int64_t rows, dim;
  int64_t dy_stride, x_stride;
  Activation activation;
  DType dtype;
};

namespace cpu {
void activation_forward(const ActivationForward& args);
void activation_backward(const ActivationBackward& args);
}  // namespace cpu

}  // namespace llmsys
