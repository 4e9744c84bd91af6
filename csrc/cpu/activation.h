// Activations of float32 vectors and their derivatives, one type each.
#pragma once

#include "../linear.h"
#include "simd.h"

namespace llmsys::cpu::LLMSYS_ISA {

struct Identity {
  static LLMSYS_INLINE F32 value(F32 z) { return z; }
  static LLMSYS_INLINE F32 slope(F32) { return splat(1.0f); }
};

struct ReLU {
  static LLMSYS_INLINE F32 value(F32 z) { return z <= 0.0f ? F32{} : z; }  // NaN through
  static LLMSYS_INLINE F32 slope(F32 z) { return z <= 0.0f ? F32{} : splat(1.0f); }
};

struct ReLU2 {
  static LLMSYS_INLINE F32 value(F32 z) { return ReLU::value(z) * ReLU::value(z); }
  static LLMSYS_INLINE F32 slope(F32 z) { return 2.0f * ReLU::value(z); }
};

struct SiLU {
  static LLMSYS_INLINE F32 value(F32 z) { return z * sigmoid(z); }
  static LLMSYS_INLINE F32 slope(F32 z) {
    const F32 s = sigmoid(z), silu = z * s;
    return s + silu * (1.0f - s);
  }
};

// Calls visit(F{}) with the type of `activation`.
template <class Visit>
LLMSYS_INLINE void with_activation(Activation activation, Visit visit) {
  switch (activation) {
    case Activation::none:
      return visit(Identity{});
    case Activation::relu:
      return visit(ReLU{});
    case Activation::relu2:
      return visit(ReLU2{});
    case Activation::silu:
      return visit(SiLU{});
  }
}

}  // namespace llmsys::cpu::LLMSYS_ISA
