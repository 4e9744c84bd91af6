#include "../attention_decode.h"

#include "binding.h"

namespace llmsys {
namespace {

Binding binding(IF_CPU([](pybind11::module_& module) {
                  using A = AttentionDecode;
                  define(module, "attention_decode", without_stream<A, cpu::attention_decode>, &A::q, &A::k, &A::v,
                         &A::k_scale, &A::v_scale, &A::cache_seqlens, &A::block_table, &A::alibi_slopes, &A::sinks,
                         &A::y, &A::lse, &A::batch, &A::tokens, &A::heads, &A::kv_heads, &A::dim, &A::value_dim,
                         &A::block_size, &A::q_batch_stride, &A::q_token_stride, &A::q_head_stride, &A::k_block_stride,
                         &A::k_token_stride, &A::k_head_stride, &A::v_block_stride, &A::v_token_stride,
                         &A::v_head_stride, &A::k_scale_block_stride, &A::k_scale_token_stride, &A::k_scale_head_stride,
                         &A::v_scale_block_stride, &A::v_scale_token_stride, &A::v_scale_head_stride, &A::table_stride,
                         &A::alibi_stride, &A::window_left, &A::window_right, &A::scale, &A::softcap, &A::int8,
                         &A::dtype);
                }),
                nullptr);

}  // namespace
}  // namespace llmsys
