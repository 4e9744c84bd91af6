#include "../swiglu.h"

#include "binding.h"

namespace llmsys {
namespace {

void bind(pybind11::module_& module, Kernel<SwiGLUForward> forward, Kernel<SwiGLUBackward> backward) {
  using F = SwiGLUForward;
  define(module, "swiglu_forward", forward, &F::gate, &F::up, &F::y, &F::rows, &F::dim, &F::gate_stride, &F::up_stride,
         &F::dtype);
  using B = SwiGLUBackward;
  define(module, "swiglu_backward", backward, &B::dy, &B::gate, &B::up, &B::dgate, &B::dup, &B::rows, &B::dim,
         &B::dy_stride, &B::gate_stride, &B::up_stride, &B::dtype);
}

Binding binding(IF_CPU([](pybind11::module_& module) {
                  bind(module, without_stream<SwiGLUForward, cpu::swiglu_forward>,
                       without_stream<SwiGLUBackward, cpu::swiglu_backward>);
                }),
                IF_CUDA([](pybind11::module_& module) { bind(module, cuda::swiglu_forward, cuda::swiglu_backward); }));

}  // namespace
}  // namespace llmsys
