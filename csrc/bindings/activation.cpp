#include "../activation.h"

#include "binding.h"

namespace llmsys {
namespace {

void bind(pybind11::module_& module, Kernel<ActivationForward> forward, Kernel<ActivationBackward> backward) {
  using F = ActivationForward;
  define(module, "activation_forward", forward, &F::x, &F::y, &F::rows, &F::dim, &F::x_stride, &F::activation,
         &F::dtype);
  using B = ActivationBackward;
  define(module, "activation_backward", backward, &B::dy, &B::x, &B::dx, &B::rows, &B::dim, &B::dy_stride, &B::x_stride,
         &B::activation, &B::dtype);
}

Binding binding(IF_CPU([](pybind11::module_& module) {
                  bind(module, without_stream<ActivationForward, cpu::activation_forward>,
                       without_stream<ActivationBackward, cpu::activation_backward>);
                }),
                nullptr);

}  // namespace
}  // namespace llmsys
