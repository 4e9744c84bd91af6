// Cross entropy of rows of logits and their gradient, computed in float32 (sums in double) and rounded once.
//
//   z = softcap · tanh(logits / softcap), or logits where softcap is 0
//   lse = log(sum_c e^z[c])
//   loss = w[t] · ((1 - s) · (lse - z[t]) + z_loss · lse²) + s / V · sum_c w[c] · (lse - z[c])    s: label_smoothing
//
// A row whose target is ignore_index has loss, lse and gradient 0, and its logits are not read. One whose target is
// outside [0, classes) has loss and gradient NaN.
// Rows are contiguous inside; `*_stride` is the distance between rows, in elements.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace llmsys {

struct CrossEntropyForward {
  const void* logits;     // (rows, classes)
  const int64_t* target;  // (rows)
  const float* weight;    // (classes), or null: 1
  const float* scale;     // (rows): what dlogits is times, or null: 1
  float* loss;            // (rows)
  float* lse;             // (rows)
  void* dlogits;          // (rows, classes): gradient of the sum of scale · loss, or null; may be `logits`
  int64_t rows, classes;
  int64_t logits_stride, dlogits_stride;
  int64_t ignore_index;
  float label_smoothing, z_loss, softcap;
  DType dtype;
};

struct CrossEntropyBackward {
  const float* dloss;     // (rows)
  const float* dlse;      // (rows), or null: 0
  const void* logits;     // (rows, classes)
  const int64_t* target;  // (rows)
  const float* weight;    // (classes), or null: 1
  const float* lse;       // (rows)
  void* dlogits;          // (rows, classes); may be `logits`
  int64_t rows, classes;
  int64_t logits_stride, dlogits_stride;
  int64_t ignore_index;
  float label_smoothing, z_loss, softcap;
  DType dtype;
};

namespace cpu {
void cross_entropy_forward(const CrossEntropyForward& args);
void cross_entropy_backward(const CrossEntropyBackward& args);
}  // namespace cpu

namespace cuda {
void cross_entropy_forward(const CrossEntropyForward& args, void* stream);
void cross_entropy_backward(const CrossEntropyBackward& args, void* stream);
}  // namespace cuda

}  // namespace llmsys
