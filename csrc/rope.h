// Rotary position embedding: pairs of elements of each head, rotated by the angles of the token's position. Queries and
// keys in one pass, or one tensor alone.
//
//   y1 = x1 * cos - x2 * sin,  y2 = x2 * cos + x1 * sin       (inverse: sin negated, which is the backward)
//
// Pair i is elements (i, i + rotary_dim / 2), or (2i, 2i + 1) when interleaved; elements from rotary_dim on are copied.
// Source: Su et al. 2021, arXiv:2104.09864, eq. 15.
// Heads are contiguous inside; strides are in elements. An output may be its input, with the same strides.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace llmsys {

struct Rope {
  const void* q;     // (batch, tokens, q_heads, head_dim)
  const void* k;     // (batch, tokens, k_heads, head_dim); null with k_heads = 0
  void* q_out;       // as q
  void* k_out;       // as k
  const float* cos;  // (batch, tokens, rotary_dim / 2); batch stride 0 where all sequences share it
  const float* sin;  // the same shape and strides
  int64_t batch, tokens, q_heads, k_heads, head_dim, rotary_dim;
  int64_t q_batch_stride, q_token_stride, q_head_stride;
  int64_t k_batch_stride, k_token_stride, k_head_stride;
  int64_t q_out_batch_stride, q_out_token_stride, q_out_head_stride;
  int64_t k_out_batch_stride, k_out_token_stride, k_out_head_stride;
  int64_t table_batch_stride, table_token_stride;
  bool interleaved, inverse;
  DType dtype;
};

namespace cpu {
void rope(const Rope& args);
}  // namespace cpu

namespace cuda {
void rope(const Rope& args, void* stream);
}  // namespace cuda

}  // namespace llmsys
