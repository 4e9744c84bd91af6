// The arithmetic of one AdamW step on vectors, whatever form its states are kept in: see ../adamw.h.
#pragma once

#include "simd.h"

namespace llmsys::cpu::LLMSYS_ISA {

// What all elements share: computed in float64, rounded once.
struct AdamWShared {
  float grad_scale, decay, toward_grad, beta2, one_minus_beta2, step_size, eps;
  bool from_grad;  // m starts from g, not from m: see adamw.h

  template <class Args>
  explicit AdamWShared(const Args& args) {
    const float scale = args.grad_scale ? *args.grad_scale : 1.0f;
    grad_scale = args.maximize ? -scale : scale;
    decay = float(1.0 - args.lr * args.weight_decay);
    from_grad = args.beta1 <= 0.5;
    toward_grad = float(from_grad ? -args.beta1 : 1.0 - args.beta1);
    beta2 = float(args.beta2);
    one_minus_beta2 = float(1.0 - args.beta2);
    // sqrt(bias_correction2) taken out of the denominator: one division an element instead of two.
    const double correction2 = __builtin_sqrt(args.bias_correction2);
    step_size = float(args.lr / args.bias_correction1 * correction2);
    eps = float(args.eps * correction2);
  }
};

// The moments after a gradient.
template <bool kFromGrad>
LLMSYS_INLINE void update_moments(const AdamWShared& shared, F32 g, F32& m, F32& v) {
  g = g * shared.grad_scale;
  m = multiply_add(g - m, shared.toward_grad, kFromGrad ? g : m);
  v = multiply_add(v, shared.beta2, g * shared.one_minus_beta2 * g);
}

template <bool kFromGrad>
LLMSYS_INLINE void adamw_update(const AdamWShared& shared, F32 g, F32& p, F32& m, F32& v) {
  update_moments<kFromGrad>(shared, g, m, v);
  p = multiply_add(p, shared.decay, -(shared.step_size * m / (sqrt(v) + shared.eps)));
}

}  // namespace llmsys::cpu::LLMSYS_ISA
