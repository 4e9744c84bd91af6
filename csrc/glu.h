// Gated linear units: y = f(gate) * up, computed in float32 and rounded once.
// Source: Shazeer 2020, arXiv:2002.05202, eqs. 5 and 6 (what stands between the two projections).
// Rows are contiguous inside; `*_stride` is the distance between rows, in elements. Outputs are contiguous.
#pragma once

#include <cstdint>

#include "activation.h"

namespace llmsys {

struct GLUForward {
  const void* gate;  // (rows, dim)
  const void* up;    // (rows, dim)
  void* y;           // (rows, dim)
  int64_t rows, dim;
  int64_t gate_stride, up_stride;
  Activation activation;
  DType dtype;
};

struct GLUBackward {
  const void* dy;    // (rows, dim)
  const void* gate;  // (rows, dim)
  const void* up;    // (rows, dim)
  void* dgate;       // (rows, dim)
  void* dup;         // (rows, dim)
  int64_t rows, dim;
  int64_t dy_stride, gate_stride, up_stride;
  Activation activation;
  DType dtype;
};

namespace cpu {
void glu_forward(const GLUForward& args);
void glu_backward(const GLUBackward& args);
}  // namespace cpu

}  // namespace llmsys
