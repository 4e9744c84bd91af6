#include "../rope.h"

#include "binding.h"

namespace llmsys {
namespace {

void bind(pybind11::module_& module, Kernel<Rope> kernel) {
  using R = Rope;
  define(module, "rope", kernel, &R::q, &R::k, &R::q_out, &R::k_out, &R::cos, &R::sin, &R::batch, &R::tokens,
         &R::q_heads, &R::k_heads, &R::head_dim, &R::rotary_dim, &R::q_batch_stride, &R::q_token_stride,
         &R::q_head_stride, &R::k_batch_stride, &R::k_token_stride, &R::k_head_stride, &R::q_out_batch_stride,
         &R::q_out_token_stride, &R::q_out_head_stride, &R::k_out_batch_stride, &R::k_out_token_stride,
         &R::k_out_head_stride, &R::table_batch_stride, &R::table_token_stride, &R::interleaved, &R::inverse,
         &R::dtype);
}

Binding binding(IF_CPU([](pybind11::module_& module) { bind(module, without_stream<Rope, cpu::rope>); }),
                IF_CUDA([](pybind11::module_& module) { bind(module, cuda::rope); }));

}  // namespace
}  // namespace llmsys
