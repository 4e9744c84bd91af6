// Rows at two distances, as the heads of a fused projection lie: `inner` rows `stride` apart, and so many again
// `outer_stride` further on. Rows at one distance are groups of one.
#pragma once

#include "numbers.h"

namespace llmsys {

// Where row `row` starts, in elements.
LLMSYS_ANYWHERE int64_t row_start(int64_t row, int64_t inner, int64_t stride, int64_t outer_stride) {
  return inner == 1 ? row * outer_stride : row / inner * outer_stride + row % inner * stride;
}

}  // namespace llmsys
