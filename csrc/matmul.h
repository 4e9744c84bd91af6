// Matrix product: c = scale a b, added to c or not, summed in float32 and rounded once.
// a and b have two strides, in elements; one of them is 1 where it is to be fast. The rows of c are contiguous inside.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace llmsys {

struct Matmul {
  const void* a;  // (rows, depth)
  const void* b;  // (depth, cols)
  void* c;        // (rows, cols); neither a nor b
  int64_t rows, cols, depth;
  int64_t a_row_stride, a_col_stride, b_row_stride, b_col_stride, c_stride;
  float scale;
  bool add;  // to what c holds
  DType dtype, c_dtype;
};

namespace cpu {
void matmul(const Matmul& args);
}  // namespace cpu

}  // namespace llmsys
