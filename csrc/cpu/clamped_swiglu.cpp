#include "../clamped_swiglu.h"

#include "functions.h"
#include "pointwise.h"

namespace llmsys::cpu::LLMSYS_ISA {
namespace {

// The comparisons let NaN pass.
LLMSYS_INLINE F32 at_most(F32 x, float limit) { return x > limit ? splat(limit) : x; }
LLMSYS_INLINE F32 clamped(F32 x, float limit) { return x < -limit ? splat(-limit) : at_most(x, limit); }

struct Forward {
  float limit, alpha;
  LLMSYS_INLINE Results<1> operator()(F32 gate, F32 up) const {
    F32 g = at_most(gate, limit);
    return {g * sigmoid(alpha * g) * (clamped(up, limit) + 1.0f)};
  }
};

// dgate = dy (u + 1) (s + alpha g s (1 - s)) with s = sigmoid(alpha g), dup = dy g s; 0 where a limit holds
struct Backward {
  float limit, alpha;
  LLMSYS_INLINE Results<2> operator()(F32 dy, F32 gate, F32 up) const {
    F32 g = at_most(gate, limit);
    F32 s = sigmoid(alpha * g), value = g * s;
    F32 dgate = dy * (clamped(up, limit) + 1.0f) * multiply_add(alpha * value, 1.0f - s, s);
    return {gate > limit ? F32{} : dgate, up > limit ? F32{} : (up < -limit ? F32{} : dy * value)};
  }
};

}  // namespace

void clamped_swiglu_forward(const ClampedSwiGLUForward& args) {
  pointwise(args.dtype, args.rows, args.dim, Forward{args.limit, args.alpha}, Outputs<1>{args.y},
            Input{args.gate, args.gate_stride}, Input{args.up, args.up_stride});
}

void clamped_swiglu_backward(const ClampedSwiGLUBackward& args) {
  pointwise(args.dtype, args.rows, args.dim, Backward{args.limit, args.alpha}, Outputs<2>{args.dgate, args.dup},
            Input{args.dy, args.dy_stride}, Input{args.gate, args.gate_stride}, Input{args.up, args.up_stride});
}

}  // namespace llmsys::cpu::LLMSYS_ISA

LLMSYS_DISPATCH(clamped_swiglu_forward, ClampedSwiGLUForward)
LLMSYS_DISPATCH(clamped_swiglu_backward, ClampedSwiGLUBackward)
