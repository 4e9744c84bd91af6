// L2 norm over a list of tensors, as if they were one vector.
//
// Each tensor is summed in chunks of kGradNormChunk elements, each chunk in float32; the chunks are then summed in
// float64, in order: the same bits whatever the number of threads.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace llmsys {

constexpr int64_t kGradNormChunk = 4096;

struct GradNormTensor {
  const void* data;  // (numel,) dtype
  int64_t numel;
  DType dtype;
};

struct GradNorm {
  const GradNormTensor* tensors;  // on the host
  int64_t num_tensors;
  float* norm;  // one element where the tensors are
};

namespace cpu {
void grad_norm(const GradNorm& args);
}  // namespace cpu

}  // namespace llmsys
