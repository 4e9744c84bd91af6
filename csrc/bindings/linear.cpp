#include "../linear.h"

#include "binding.h"

namespace llmsys {

namespace {

[[maybe_unused]] void bind(pybind11::module_& module, Kernel<LinearForward> forward, Kernel<LinearBackward> backward) {
  using F = LinearForward;
  define(module, "linear_forward", forward, &F::x, &F::weight, &F::bias, &F::residual, &F::y, &F::pre, &F::rows,
         &F::cols, &F::depth, &F::x_row_stride, &F::x_col_stride, &F::weight_row_stride, &F::weight_col_stride,
         &F::residual_stride, &F::activation, &F::dtype);
  using B = LinearBackward;
  define(module, "linear_backward", backward, &B::dy, &B::x, &B::weight, &B::pre, &B::dz, &B::dx, &B::dweight,
         &B::dbias, &B::rows, &B::cols, &B::depth, &B::dy_row_stride, &B::dy_col_stride, &B::x_row_stride,
         &B::x_col_stride, &B::weight_row_stride, &B::weight_col_stride, &B::activation, &B::dtype);
}

Binding binding(IF_CPU([](pybind11::module_& module) {
                  bind(module, without_stream<LinearForward, cpu::linear_forward>,
                       without_stream<LinearBackward, cpu::linear_backward>);
                }),
                nullptr);

}  // namespace
}  // namespace llmsys
