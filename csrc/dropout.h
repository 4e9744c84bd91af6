// Dropout: y = x * scale where the element's random word is at least `threshold`, else 0.
// Source: Srivastava et al. 2014, JMLR 15, section 4, scaled at training time; words: cpu/philox.h.
// Rows are contiguous inside; x_stride is the distance between them, in elements. The output is contiguous.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace llmsys {

struct Dropout {
  const void* x;  // (rows, dim)
  void* y;        // (rows, dim)
  int64_t rows, dim;
  int64_t x_stride;
  int64_t seed, offset;  // element i of all rows takes word offset + i
  uint32_t threshold;
  float scale;
  DType dtype;
};

namespace cpu {
void dropout(const Dropout& args);
}  // namespace cpu

}  // namespace llmsys
