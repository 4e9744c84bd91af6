// Attention: y[t] = sum over s of e^(z[t, s] - lse[t]) v[s], with z[t, s] = scale * q[t].k[s] and what changes it.
// See llmsys/ops/attention/__init__.py for all of it.
// Source: Dao et al. 2022, arXiv:2205.14135; Dao 2023, arXiv:2307.08691.
//
// q, k, v, dy are contiguous in their last dimension; strides are in elements. Outputs are contiguous.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace llmsys {

// Both directions; a pointer that a direction does not use, or an option that is off, is null.
struct Attention {
  const void* q;              // (batch, queries, heads, dim) dtype
  const void* k;              // (batch, keys, kv_heads, dim) dtype
  const void* v;              // (batch, keys, kv_heads, value_dim) dtype
  const void* bias;           // (batch, heads, queries, keys) bias_dtype, by its strides; along keys contiguous
  const float* sinks;         // (heads,)
  const float* alibi_slopes;  // (batch or sequences, heads)
  const uint8_t* block_mask;  // (batch, heads, ceil(queries / block_size), ceil(keys / block_size)), by its strides
  const int32_t* rows;        // (4, queries): the first key a query sees, the end, its own place, its sequence
  void* y;                    // (batch, queries, heads, value_dim) dtype
  float* lse;                 // (batch, heads, queries)
  const void* dy;             // (batch, queries, heads, value_dim) dtype
  const float* dlse;          // (batch, heads, queries)
  float* delta;               // (batch, heads, queries): the sum of dy * y, less dlse; made by the backward
  void *dq, *dk, *dv;         // as q, k, v
  float* dbias;               // (bias_batches, bias_heads, queries, keys)
  int64_t batch, queries, keys, heads, kv_heads, dim, value_dim;
  int64_t q_batch_stride, q_row_stride, q_head_stride;
  int64_t k_batch_stride, k_row_stride, k_head_stride;
  int64_t v_batch_stride, v_row_stride, v_head_stride;
  int64_t dy_batch_stride, dy_row_stride, dy_head_stride;
  int64_t bias_batches, bias_heads, bias_batch_stride, bias_head_stride, bias_row_stride;
  int64_t mask_batch_stride, mask_head_stride, block_size;
  float scale, softcap;
  int64_t seed;
  uint32_t threshold;  // a probability is kept where its word is at least this, times kept_scale
  float kept_scale;
  DType dtype, bias_dtype;
};

namespace cpu {
void attention_forward(const Attention& args);
void attention_backward(const Attention& args);  // delta, dq, dk, dv
void attention_dbias(const Attention& args);     // after it: dbias
}  // namespace cpu

namespace cuda {
void attention_forward(const Attention& args, void* stream);
void attention_backward(const Attention& args, void* stream);
void attention_dbias(const Attention& args, void* stream);
}  // namespace cuda

}  // namespace llmsys
