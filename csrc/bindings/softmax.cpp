#include "../softmax.h"

#include "binding.h"

namespace llmsys {
namespace {

Binding binding(IF_CPU([](pybind11::module_& module) {
                  using F = SoftmaxForward;
                  define(module, "softmax_forward", Kernel<F>(without_stream<F, cpu::softmax_forward>), &F::x, &F::y,
                         &F::rows, &F::dim, &F::inner, &F::x_stride, &F::x_outer_stride, &F::dtype);
                  using B = SoftmaxBackward;
                  define(module, "softmax_backward", Kernel<B>(without_stream<B, cpu::softmax_backward>), &B::dy, &B::y,
                         &B::dx, &B::rows, &B::dim, &B::inner, &B::dy_stride, &B::dy_outer_stride, &B::y_stride,
                         &B::y_outer_stride, &B::dtype);
                }),
                nullptr);

}  // namespace
}  // namespace llmsys
