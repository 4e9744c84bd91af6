#include "../sgd.h"

#include "dispatch.h"
#include "list_update.h"

namespace llmsys::cpu::LLMSYS_ISA {

void sgd(const Sgd& args) {
  const float scale = args.grad_scale ? *args.grad_scale : 1.0f, grad_scale = args.maximize ? -scale : scale;
  const float lr = float(args.lr), momentum = float(args.momentum), toward_grad = float(args.toward_grad);
  const float weight_decay = float(args.weight_decay);
  const bool has_buffer = args.momentum != 0, nesterov = args.nesterov;
  auto update = [=](F32 grad, F32& p, F32(&states)[1]) {
    F32& buffer = states[0];
    grad = grad * grad_scale;
    if (weight_decay != 0) grad = grad + weight_decay * p;
    if (has_buffer) {
      buffer = buffer * momentum + grad * toward_grad;
      grad = nesterov ? grad + momentum * buffer : buffer;
    }
    p = p - lr * grad;
  };
  for_each_tensor<1>(args, args.tensors, [&](auto p, auto g, const auto& rounding, const auto& tensor, const Run& run) {
    update_elements<decltype(p), decltype(g)>(tensor, {tensor.momentum_buffer}, run, rounding, update);
  });
}

}  // namespace llmsys::cpu::LLMSYS_ISA

LLMSYS_DISPATCH(sgd, Sgd)
