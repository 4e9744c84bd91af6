// Attention of a few tokens of each sequence to a cache of keys and values, split over the keys.
//
//   z[t, s] = scale * q[t].k[s], then softcap * tanh(z / softcap), then - alibi_slope * |place(t) - s|
//   y[t] = softmax_s(z[t, s]) v[s],  lse[t] = log sum_s e^z[t, s],  place(t) = cache_seqlens - tokens + t
//
// Key s of sequence b is row s % block_size of block block_table[b, s / block_size]; without a table, of block b.
// Source: Dao et al. 2023, crfm.stanford.edu/2023/10/12/flashdecoding.
// Heads are contiguous inside; strides are in elements. Every length, and every block that a length reaches, is inside.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace llmsys {

struct AttentionDecode {
  const void* q;                 // (batch, tokens, heads, dim)
  const void* k;                 // (blocks, block_size, kv_heads, dim)
  const void* v;                 // (blocks, block_size, kv_heads, value_dim)
  const float* k_scale;          // (blocks, block_size, kv_heads); null unless `int8`
  const float* v_scale;          // the same shape
  const int32_t* cache_seqlens;  // (batch)
  const int32_t* block_table;    // (batch, max_blocks), or null
  const float* alibi_slopes;     // (batch, heads), or null
  const float* sinks;            // (heads), or null
  void* y;                       // (batch, tokens, heads, value_dim)
  float* lse;                    // (batch, heads, tokens)
  int64_t batch, tokens, heads, kv_heads, dim, value_dim, block_size;
  int64_t q_batch_stride, q_token_stride, q_head_stride;
  int64_t k_block_stride, k_token_stride, k_head_stride;
  int64_t v_block_stride, v_token_stride, v_head_stride;
  int64_t k_scale_block_stride, k_scale_token_stride, k_scale_head_stride;
  int64_t v_scale_block_stride, v_scale_token_stride, v_scale_head_stride;
  int64_t table_stride, alibi_stride;
  int64_t window_left, window_right;  // keys seen before and after a query's place, -1 for all
  float scale, softcap;               // softcap 0: none
  bool int8;                          // the cache; else it is of `dtype`, as q and y are
  DType dtype;
};

namespace cpu {
void attention_decode(const AttentionDecode& args);
}  // namespace cpu

}  // namespace llmsys
