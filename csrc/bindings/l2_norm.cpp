#include "../l2_norm.h"

#include "binding.h"

namespace llmsys {
namespace {

Binding binding(IF_CPU([](pybind11::module_& module) {
                  using F = L2NormForward;
                  define(module, "l2_norm_forward", Kernel<F>(without_stream<F, cpu::l2_norm_forward>), &F::x, &F::y,
                         &F::length, &F::rows, &F::dim, &F::inner, &F::x_stride, &F::x_outer_stride, &F::eps,
                         &F::dtype);
                  using B = L2NormBackward;
                  define(module, "l2_norm_backward", Kernel<B>(without_stream<B, cpu::l2_norm_backward>), &B::dy, &B::x,
                         &B::length, &B::dx, &B::rows, &B::dim, &B::inner, &B::dy_stride, &B::dy_outer_stride,
                         &B::x_stride, &B::x_outer_stride, &B::eps, &B::dtype);
                }),
                nullptr);

}  // namespace
}  // namespace llmsys
