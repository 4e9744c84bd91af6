// Keys and values of new tokens, written into a cache behind those that are there.
//
//   k_cache[place(b, t)] = rope(k)[b, t], or k[b, t] with rotary_dim 0;  v_cache[place(b, t)] = v[b, t]
//   int8: scale = max_d |x[d]| / 127,  code[d] = round(x[d] / scale), of each token and head
//
// Token t of sequence b goes to s = cache_seqlens[b] + t: row s % block_size of block block_table[b, s / block_size];
// without a table, of block b. Rotation is that of rope.h. A head of zeros has scale 0, one with NaN or infinity has
// that, and both have codes 0.
// Heads of k, v and the tables are contiguous inside; strides are in elements. On the CPU every place is inside; a GPU
// skips tokens whose place is not.
#pragma once

#include <cstdint>

#include "dtype.h"
#include "numbers.h"

namespace llmsys {

struct AppendKV {
  const void* k;                 // (batch, tokens, heads, dim)
  const void* v;                 // (batch, tokens, heads, value_dim)
  void* k_cache;                 // (blocks, block_size, heads, dim)
  void* v_cache;                 // (blocks, block_size, heads, value_dim)
  float* k_scale;                // (blocks, block_size, heads); null unless `int8`
  float* v_scale;                // the same shape
  const int32_t* cache_seqlens;  // (batch)
  const int32_t* block_table;    // (batch, max_blocks), or null
  const float* cos;              // (batch, tokens, rotary_dim / 2); batch stride 0 where all sequences share it
  const float* sin;              // the same shape and strides
  int64_t batch, tokens, heads, dim, value_dim, rotary_dim;
  int64_t blocks, block_size, max_blocks;  // max_blocks 1 without a table
  int64_t k_batch_stride, k_token_stride, k_head_stride;
  int64_t v_batch_stride, v_token_stride, v_head_stride;
  int64_t k_cache_block_stride, k_cache_token_stride, k_cache_head_stride, k_cache_dim_stride;
  int64_t v_cache_block_stride, v_cache_token_stride, v_cache_head_stride, v_cache_dim_stride;
  int64_t k_scale_block_stride, k_scale_token_stride, k_scale_head_stride;
  int64_t v_scale_block_stride, v_scale_token_stride, v_scale_head_stride;
  int64_t block_table_stride, table_batch_stride, table_token_stride;  // the last two of cos and sin
  bool interleaved, int8;
  DType dtype;  // of k and v, and of the caches unless `int8`
};

// Keys or values: where the new ones are, and the cache that they go to.
struct Appended {
  const void* x;
  void* cache;
  float* scale;
  int64_t dim, rotary_dim;
  int64_t batch_stride, token_stride, head_stride;
  int64_t cache_block_stride, cache_token_stride, cache_head_stride, cache_dim_stride;
  int64_t scale_block_stride, scale_token_stride, scale_head_stride;
};

LLMSYS_ANYWHERE Appended keys_of(const AppendKV& args) {
  return {args.k,
          args.k_cache,
          args.k_scale,
          args.dim,
          args.rotary_dim,
          args.k_batch_stride,
          args.k_token_stride,
          args.k_head_stride,
          args.k_cache_block_stride,
          args.k_cache_token_stride,
          args.k_cache_head_stride,
          args.k_cache_dim_stride,
          args.k_scale_block_stride,
          args.k_scale_token_stride,
          args.k_scale_head_stride};
}

LLMSYS_ANYWHERE Appended values_of(const AppendKV& args) {
  return {args.v,
          args.v_cache,
          args.v_scale,
          args.value_dim,
          0,
          args.v_batch_stride,
          args.v_token_stride,
          args.v_head_stride,
          args.v_cache_block_stride,
          args.v_cache_token_stride,
          args.v_cache_head_stride,
          args.v_cache_dim_stride,
          args.v_scale_block_stride,
          args.v_scale_token_stride,
          args.v_scale_head_stride};
}

namespace cpu {
void append_kv(const AppendKV& args);
}  // namespace cpu

namespace cuda {
void append_kv(const AppendKV& args, void* stream);
}  // namespace cuda

}  // namespace llmsys
