// Clamped SwiGLU: y = g * sigmoid(alpha * g) * (u + 1) with g = min(gate, limit) and u = up clamped to [-limit, limit],
// computed in float32 and rounded once.
// Source: OpenAI 2025, github.com/openai/gpt-oss, gpt_oss/torch/model.py, swiglu.
// Rows are contiguous inside; `*_stride` is the distance between rows, in elements. Outputs are contiguous.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace llmsys {

struct ClampedSwiGLUForward {
  const void* gate;  // (rows, dim)
  const void* up;    // (rows, dim)
  void* y;           // (rows, dim)
  int64_t rows, dim;
  int64_t gate_stride, up_stride;
  float limit, alpha;
  DType dtype;
};

struct ClampedSwiGLUBackward {
  const void* dy;    // (rows, dim)
  const void* gate;  // (rows, dim)
  const void* up;    // (rows, dim)
  void* dgate;       // (rows, dim)
  void* dup;         // (rows, dim)
  int64_t rows, dim;
  int64_t dy_stride, gate_stride, up_stride;
  float limit, alpha;
  DType dtype;
};

namespace cpu {
void clamped_swiglu_forward(const ClampedSwiGLUForward& args);
void clamped_swiglu_backward(const ClampedSwiGLUBackward& args);
}  // namespace cpu

}  // namespace llmsys
