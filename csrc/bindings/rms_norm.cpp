#include "../rms_norm.h"

#include "binding.h"

namespace llmsys {
namespace {

void bind(pybind11::module_& module, Kernel<RMSNormForward> forward, Kernel<RMSNormBackward> backward) {
  using F = RMSNormForward;
  define(module, "rms_norm_forward", forward, &F::x, &F::residual, &F::weight, &F::sum, &F::y, &F::rstd, &F::rows,
         &F::dim, &F::inner, &F::x_stride, &F::x_outer_stride, &F::residual_stride, &F::residual_outer_stride, &F::eps,
         &F::weight_offset, &F::dtype, &F::weight_dtype);
  using B = RMSNormBackward;
  define(module, "rms_norm_backward", backward, &B::dy, &B::dsum, &B::s, &B::weight, &B::rstd, &B::dx, &B::dweight,
         &B::partial, &B::rows, &B::dim, &B::chunks, &B::inner, &B::dy_stride, &B::dy_outer_stride, &B::dsum_stride,
         &B::dsum_outer_stride, &B::s_stride, &B::s_outer_stride, &B::weight_offset, &B::dtype, &B::weight_dtype);
}

Binding binding(IF_CPU([](pybind11::module_& module) {
                  bind(module, without_stream<RMSNormForward, cpu::rms_norm_forward>,
                       without_stream<RMSNormBackward, cpu::rms_norm_backward>);
                }),
                IF_CUDA([](pybind11::module_& module) {
                  bind(module, cuda::rms_norm_forward, cuda::rms_norm_backward);
                }));

}  // namespace
}  // namespace llmsys
