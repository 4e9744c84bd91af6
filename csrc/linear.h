// Linear: y = activation(x weight^T + bias) + residual, summed in float32 and rounded once.
// Each matrix has two strides, in elements; one of them is 1 where it is to be fast. Outputs are contiguous.
#pragma once

#include <cstdint>

#include "activation.h"
#include "dtype.h"

namespace llmsys {

struct LinearForward {
  const void* x;         // (rows, depth)
  const void* weight;    // (cols, depth)
  const void* bias;      // (cols,), contiguous, or null
  const void* residual;  // (rows, cols), rows contiguous inside, or null
  void* y;               // (rows, cols)
  void* pre;             // (rows, cols): what the activation is applied to; null where a backward needs it not
  int64_t rows, cols, depth;
  int64_t x_row_stride, x_col_stride, weight_row_stride, weight_col_stride, residual_stride;
  Activation activation;
  DType dtype;
};

struct LinearBackward {
  const void* dy;      // (rows, cols); rows contiguous inside where pre or dbias is not null
  const void* x;       // (rows, depth)
  const void* weight;  // (cols, depth)
  const void* pre;     // (rows, cols), contiguous; null where there is no activation
  void* dz;            // (rows, cols): room for the gradient of pre; null where there is no activation
  void* dx;            // (rows, depth) or null where not needed
  void* dweight;       // (cols, depth) or null
  void* dbias;         // (cols,) or null
  int64_t rows, cols, depth;
  int64_t dy_row_stride, dy_col_stride, x_row_stride, x_col_stride, weight_row_stride, weight_col_stride;
  Activation activation;
  DType dtype;
};

namespace cpu {
void linear_forward(const LinearForward& args);
void linear_backward(const LinearBackward& args);
}  // namespace cpu

}  // namespace llmsys
