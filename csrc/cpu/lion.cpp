#include "../lion.h"

#include "dispatch.h"
#include "list_update.h"

namespace llmsys::cpu::LLMSYS_ISA {

void lion(const Lion& args) {
  const float scale = args.grad_scale ? *args.grad_scale : 1.0f, grad_scale = args.maximize ? -scale : scale;
  const float lr = float(args.lr), decay = float(1.0 - args.lr * args.weight_decay);
  const float beta1 = float(args.beta1), one_minus_beta1 = float(1.0 - args.beta1);
  const float beta2 = float(args.beta2), one_minus_beta2 = float(1.0 - args.beta2);
  auto update = [=](F32 grad, F32& p, F32(&states)[1]) {
    F32& m = states[0];
    grad = grad * grad_scale;
    const F32 c = multiply_add(m, beta1, grad * one_minus_beta1);
    // Neither above nor below 0 is 0, or NaN: then p becomes NaN too.
    p = p * decay - select(c > 0.0f, splat(lr), select(c < 0.0f, splat(-lr), c));
    m = multiply_add(m, beta2, grad * one_minus_beta2);
  };
  for_each_tensor<1>(args, args.tensors, [&](auto p, auto g, const auto& rounding, const auto& tensor, const Run& run) {
    update_elements<decltype(p), decltype(g)>(tensor, {tensor.exp_avg}, run, rounding, update);
  });
}

}  // namespace llmsys::cpu::LLMSYS_ISA

LLMSYS_DISPATCH(lion, Lion)
