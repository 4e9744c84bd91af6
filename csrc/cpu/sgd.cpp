#include "../sgd.h"

#include "dispatch.h"
#include "list_update.h"

namespace llmsys::cpu::LLMSYS_ISA {

void sgd(const Sgd& args) {
  const float scale = args.grad_scale ? *args.grad_scale : 1.0f, grad_scale = args.maximize ? -scale : scale;
  const float lr = float(args.lr), momentum = float(args.momentum), toward_grad = float(args.toward_grad);
  const float weight_decay = float(args.weight_decay);
  for_each_tensor(args, args.tensors, [&](auto p, auto g, const SgdTensor& tensor, int64_t begin, int64_t end) {
    const bool has_buffer = tensor.momentum_buffer, nesterov = args.nesterov;
    update_elements<decltype(p), decltype(g)>(tensor, tensor.momentum_buffer, begin, end,
                                              [=](F32 grad, F32& p, F32& buffer) {
                                                grad = grad * grad_scale;
                                                if (weight_decay != 0) grad = grad + weight_decay * p;
                                                if (has_buffer) {
                                                  buffer = buffer * momentum + grad * toward_grad;
                                                  grad = nesterov ? grad + momentum * buffer : buffer;
                                                }
                                                p = p - lr * grad;
                                              });
  });
}

}  // namespace llmsys::cpu::LLMSYS_ISA

LLMSYS_DISPATCH(sgd, Sgd)
