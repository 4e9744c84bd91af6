#include "../attention.h"

#include "binding.h"

namespace llmsys {
namespace {

using A = Attention;

void define_direction(pybind11::module_& module, const char* name, Kernel<A> kernel) {
  define(module, name, kernel, &A::q, &A::k, &A::v, &A::bias, &A::sinks, &A::alibi_slopes, &A::block_mask, &A::rows,
         &A::y, &A::lse, &A::dy, &A::dlse, &A::delta, &A::dq, &A::dk, &A::dv, &A::dbias, &A::batch, &A::queries,
         &A::keys, &A::heads, &A::kv_heads, &A::dim, &A::value_dim, &A::q_batch_stride, &A::q_row_stride,
         &A::q_head_stride, &A::k_batch_stride, &A::k_row_stride, &A::k_head_stride, &A::v_batch_stride,
         &A::v_row_stride, &A::v_head_stride, &A::dy_batch_stride, &A::dy_row_stride, &A::dy_head_stride,
         &A::bias_batches, &A::bias_heads, &A::bias_batch_stride, &A::bias_head_stride, &A::bias_row_stride,
         &A::mask_batch_stride, &A::mask_head_stride, &A::block_size, &A::scale, &A::softcap, &A::seed, &A::threshold,
         &A::kept_scale, &A::dtype, &A::bias_dtype);
}

Binding binding(IF_CPU([](pybind11::module_& module) {
                  define_direction(module, "attention_forward", without_stream<A, cpu::attention_forward>);
                  define_direction(module, "attention_backward", without_stream<A, cpu::attention_backward>);
                  define_direction(module, "attention_dbias", without_stream<A, cpu::attention_dbias>);
                }),
                IF_CUDA([](pybind11::module_& module) {
                  define_direction(module, "attention_forward", cuda::attention_forward);
                  define_direction(module, "attention_backward", cuda::attention_backward);
                  define_direction(module, "attention_dbias", cuda::attention_dbias);
                }));

}  // namespace
}  // namespace llmsys
