#include "../group_norm.h"

#include "binding.h"

namespace llmsys {
namespace {

Binding binding(IF_CPU([](pybind11::module_& module) {
                  using F = GroupNormForward;
                  define(module, "group_norm_forward", Kernel<F>(without_stream<F, cpu::group_norm_forward>), &F::x,
                         &F::weight, &F::bias, &F::y, &F::mean, &F::rstd, &F::samples, &F::channels, &F::size,
                         &F::groups, &F::eps, &F::dtype, &F::weight_dtype);
                  using B = GroupNormBackward;
                  define(module, "group_norm_backward", Kernel<B>(without_stream<B, cpu::group_norm_backward>), &B::dy,
                         &B::x, &B::weight, &B::mean, &B::rstd, &B::dx, &B::dweight, &B::dbias, &B::dweight_parts,
                         &B::dbias_parts, &B::samples, &B::channels, &B::size, &B::groups, &B::dtype, &B::weight_dtype);
                }),
                nullptr);

}  // namespace
}  // namespace llmsys
