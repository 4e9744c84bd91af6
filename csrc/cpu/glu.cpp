#include "../glu.h"

#include "activation.h"
#include "pointwise.h"

namespace llmsys::cpu::LLMSYS_ISA {
namespace {

template <class F>
struct Forward {
  LLMSYS_INLINE Results<1> operator()(F32 gate, F32 up) const { return {F::value(gate) * up}; }
};

// dgate = dy * up * f'(gate), dup = dy * f(gate)
template <class F>
struct Backward {
  LLMSYS_INLINE Results<2> operator()(F32 dy, F32 gate, F32 up) const {
    auto [value, slope] = F::with_slope(gate);
    return {dy * up * slope, dy * value};
  }
};

}  // namespace

void glu_forward(const GLUForward& args) {
  with_activation(args.activation, [&](auto f) {
    pointwise(args.dtype, args.rows, args.dim, Forward<decltype(f)>{}, Outputs<1>{args.y},
              Input{args.gate, args.gate_stride}, Input{args.up, args.up_stride});
  });
}

void glu_backward(const GLUBackward& args) {
  with_activation(args.activation, [&](auto f) {
    pointwise(args.dtype, args.rows, args.dim, Backward<decltype(f)>{}, Outputs<2>{args.dgate, args.dup},
              Input{args.dy, args.dy_stride}, Input{args.gate, args.gate_stride}, Input{args.up, args.up_stride});
  });
}

}  // namespace llmsys::cpu::LLMSYS_ISA

LLMSYS_DISPATCH(glu_forward, GLUForward)
LLMSYS_DISPATCH(glu_backward, GLUBackward)
