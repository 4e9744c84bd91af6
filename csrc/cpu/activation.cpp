#include "activation.h"

#include "pointwise.h"

namespace llmsys::cpu::LLMSYS_ISA {
namespace {

template <class F>
struct Forward {
  LLMSYS_INLINE Results<1> operator()(F32 x) const { return {F::value(x)}; }
};

template <class F>
struct Backward {
  LLMSYS_INLINE Results<1> operator()(F32 dy, F32 x) const { return {dy * F::with_slope(x).slope}; }
};

}  // namespace

void activation_forward(const ActivationForward& args) {
  with_activation(args.activation, [&](auto f) {
    pointwise(args.dtype, args.rows, args.dim, Forward<decltype(f)>{}, Outputs<1>{args.y},
              Input{args.x, args.x_stride});
  });
}

void activation_backward(const ActivationBackward& args) {
  with_activation(args.activation, [&](auto f) {
    pointwise(args.dtype, args.rows, args.dim, Backward<decltype(f)>{}, Outputs<1>{args.dx},
              Input{args.dy, args.dy_stride}, Input{args.x, args.x_stride});
  });
}

}  // namespace llmsys::cpu::LLMSYS_ISA

LLMSYS_DISPATCH(activation_forward, ActivationForward)
LLMSYS_DISPATCH(activation_backward, ActivationBackward)
