#include "../append_kv.h"

#include "binding.h"

namespace llmsys {
namespace {

void bind(pybind11::module_& module, Kernel<AppendKV> kernel) {
  using A = AppendKV;
  define(module, "append_kv", kernel, &A::k, &A::v, &A::k_cache, &A::v_cache, &A::k_scale, &A::v_scale,
         &A::cache_seqlens, &A::block_table, &A::cos, &A::sin, &A::batch, &A::tokens, &A::heads, &A::dim, &A::value_dim,
         &A::rotary_dim, &A::blocks, &A::block_size, &A::max_blocks, &A::k_batch_stride, &A::k_token_stride,
         &A::k_head_stride, &A::v_batch_stride, &A::v_token_stride, &A::v_head_stride, &A::k_cache_block_stride,
         &A::k_cache_token_stride, &A::k_cache_head_stride, &A::k_cache_dim_stride, &A::v_cache_block_stride,
         &A::v_cache_token_stride, &A::v_cache_head_stride, &A::v_cache_dim_stride, &A::k_scale_block_stride,
         &A::k_scale_token_stride, &A::k_scale_head_stride, &A::v_scale_block_stride, &A::v_scale_token_stride,
         &A::v_scale_head_stride, &A::block_table_stride, &A::table_batch_stride, &A::table_token_stride,
         &A::interleaved, &A::int8, &A::dtype);
}

Binding binding(IF_CPU([](pybind11::module_& module) { bind(module, without_stream<AppendKV, cpu::append_kv>); }),
                IF_CUDA([](pybind11::module_& module) { bind(module, cuda::append_kv); }));

}  // namespace
}  // namespace llmsys
