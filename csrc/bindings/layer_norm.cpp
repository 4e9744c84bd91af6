#include "../layer_norm.h"

#include "binding.h"

namespace llmsys {
namespace {

void bind(pybind11::module_& module, Kernel<LayerNormForward> forward, Kernel<LayerNormBackward> backward) {
  using F = LayerNormForward;
  define(module, "layer_norm_forward", forward, &F::x, &F::residual, &F::weight, &F::bias, &F::sum, &F::y, &F::mean,
         &F::rstd, &F::rows, &F::dim, &F::inner, &F::x_stride, &F::x_outer_stride, &F::residual_stride,
         &F::residual_outer_stride, &F::eps, &F::dtype, &F::weight_dtype);
  using B = LayerNormBackward;
  define(module, "layer_norm_backward", backward, &B::dy, &B::dsum, &B::s, &B::weight, &B::mean, &B::rstd, &B::dx,
         &B::dweight, &B::dbias, &B::dweight_parts, &B::dbias_parts, &B::rows, &B::dim, &B::chunks, &B::inner,
         &B::dy_stride, &B::dy_outer_stride, &B::dsum_stride, &B::dsum_outer_stride, &B::s_stride, &B::s_outer_stride,
         &B::dtype, &B::weight_dtype);
}

Binding binding(IF_CPU([](pybind11::module_& module) {
                  bind(module, without_stream<LayerNormForward, cpu::layer_norm_forward>,
                       without_stream<LayerNormBackward, cpu::layer_norm_backward>);
                }),
                IF_CUDA([](pybind11::module_& module) {
                  bind(module, cuda::layer_norm_forward, cuda::layer_norm_backward);
                }));

}  // namespace
}  // namespace llmsys
