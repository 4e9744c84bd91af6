#include "../cross_entropy.h"

#include "binding.h"

namespace llmsys {
namespace {

void bind(pybind11::module_& module, Kernel<CrossEntropyForward> forward, Kernel<CrossEntropyBackward> backward) {
  using F = CrossEntropyForward;
  define(module, "cross_entropy_forward", forward, &F::logits, &F::target, &F::weight, &F::scale, &F::loss, &F::lse,
         &F::dlogits, &F::rows, &F::classes, &F::logits_stride, &F::dlogits_stride, &F::ignore_index,
         &F::label_smoothing, &F::z_loss, &F::softcap, &F::dtype);
  using B = CrossEntropyBackward;
  define(module, "cross_entropy_backward", backward, &B::dloss, &B::dlse, &B::logits, &B::target, &B::weight, &B::lse,
         &B::dlogits, &B::rows, &B::classes, &B::logits_stride, &B::dlogits_stride, &B::ignore_index,
         &B::label_smoothing, &B::z_loss, &B::softcap, &B::dtype);
}

Binding binding(IF_CPU([](pybind11::module_& module) {
                  bind(module, without_stream<CrossEntropyForward, cpu::cross_entropy_forward>,
                       without_stream<CrossEntropyBackward, cpu::cross_entropy_backward>);
                }),
                IF_CUDA([](pybind11::module_& module) {
                  bind(module, cuda::cross_entropy_forward, cuda::cross_entropy_backward);
                }));

}  // namespace
}  // namespace llmsys
