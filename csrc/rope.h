// Rotary position embedding: pairs of elements of each head, rotated by the angles of the token's position.
//
//   y1 = x1 * cos - x2 * sin,  y2 = x2 * cos + x1 * sin       (inverse: sin negated, which is the backward)
//
// Pair i is elements (i, i + rotary_dim / 2), or (2i, 2i + 1) when interleaved; elements from rotary_dim on are copied.
// Source: Su et al. 2021, arXiv:2104.09864, eq. 15.
// Heads are contiguous inside; strides are in elements. The output is contiguous and may be x.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace llmsys {

struct Rope {
  const void* x;     // (batch, tokens, heads, head_dim)
  const float* cos;  // (batch, tokens, rotary_dim / 2); batch stride 0 where all sequences share it
  const float* sin;  // the same shape and strides
  void* y;           // (batch, tokens, heads, head_dim)
  int64_t batch, tokens, heads, head_dim, rotary_dim;
  int64_t x_batch_stride, x_token_stride, x_head_stride;
  int64_t table_batch_stride, table_token_stride;
  bool interleaved, inverse;
  DType dtype;
};

namespace cpu {
void rope(const Rope& args);
}  // namespace cpu

}  // namespace llmsys
