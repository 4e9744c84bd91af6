// SwiGLU: y = gate * sigmoid(gate) * up, computed in float32 and rounded once.
// Source: Shazeer 2020, arXiv:2002.05202, eq. 6 (the activation between the two projections).
// Rows are contiguous inside; `*_stride` is the distance between rows, in elements. Outputs are contiguous.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace llmsys {

struct SwiGLUForward {
  const void* gate;  // (rows, dim)
  const void* up;    // (rows, dim)
  void* y;           // (rows, dim)
  int64_t rows, dim;
  int64_t gate_stride, up_stride;
  DType dtype;
};

struct SwiGLUBackward {
  const void* dy;    // (rows, dim)
  const void* gate;  // (rows, dim)
  const void* up;    // (rows, dim)
  void* dgate;       // (rows, dim)
  void* dup;         // (rows, dim)
  int64_t rows, dim;
  int64_t dy_stride, gate_stride, up_stride;
  DType dtype;
};

namespace cpu {
void swiglu_forward(const SwiGLUForward& args);
void swiglu_backward(const SwiGLUBackward& args);
}  // namespace cpu

namespace cuda {
void swiglu_forward(const SwiGLUForward& args, void* stream);
void swiglu_backward(const SwiGLUBackward& args, void* stream);
}  // namespace cuda

}  // namespace llmsys
