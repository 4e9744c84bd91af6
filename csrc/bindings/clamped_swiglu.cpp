#include "../clamped_swiglu.h"

#include "binding.h"

namespace llmsys {
namespace {

void bind(pybind11::module_& module, Kernel<ClampedSwiGLUForward> forward, Kernel<ClampedSwiGLUBackward> backward) {
  using F = ClampedSwiGLUForward;
  define(module, "clamped_swiglu_forward", forward, &F::gate, &F::up, &F::y, &F::rows, &F::dim, &F::gate_stride,
         &F::up_stride, &F::limit, &F::alpha, &F::dtype);
  using B = ClampedSwiGLUBackward;
  define(module, "clamped_swiglu_backward", backward, &B::dy, &B::gate, &B::up, &B::dgate, &B::dup, &B::rows, &B::dim,
         &B::dy_stride, &B::gate_stride, &B::up_stride, &B::limit, &B::alpha, &B::dtype);
}

Binding binding(IF_CPU([](pybind11::module_& module) {
                  bind(module, without_stream<ClampedSwiGLUForward, cpu::clamped_swiglu_forward>,
                       without_stream<ClampedSwiGLUBackward, cpu::clamped_swiglu_backward>);
                }),
                nullptr);

}  // namespace
}  // namespace llmsys
