#include "../rope.h"

#include "binding.h"

namespace llmsys {
namespace {

Binding binding(IF_CPU([](pybind11::module_& module) {
                  using R = Rope;
                  define(module, "rope", Kernel<R>(without_stream<R, cpu::rope>), &R::x, &R::cos, &R::sin, &R::y,
                         &R::batch, &R::tokens, &R::heads, &R::head_dim, &R::rotary_dim, &R::x_batch_stride,
                         &R::x_token_stride, &R::x_head_stride, &R::table_batch_stride, &R::table_token_stride,
                         &R::interleaved, &R::inverse, &R::dtype);
                }),
                nullptr);

}  // namespace
}  // namespace llmsys
