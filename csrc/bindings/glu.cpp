#include "../glu.h"

#include "binding.h"

namespace llmsys {
namespace {

void bind(pybind11::module_& module, Kernel<GLUForward> forward, Kernel<GLUBackward> backward) {
  using F = GLUForward;
  define(module, "glu_forward", forward, &F::gate, &F::up, &F::y, &F::rows, &F::dim, &F::gate_stride, &F::up_stride,
         &F::activation, &F::dtype);
  using B = GLUBackward;
  define(module, "glu_backward", backward, &B::dy, &B::gate, &B::up, &B::dgate, &B::dup, &B::rows, &B::dim,
         &B::dy_stride, &B::gate_stride, &B::up_stride, &B::activation, &B::dtype);
}

Binding binding(IF_CPU([](pybind11::module_& module) {
                  bind(module, without_stream<GLUForward, cpu::glu_forward>,
                       without_stream<GLUBackward, cpu::glu_backward>);
                }),
                nullptr);

}  // namespace
}  // namespace llmsys
