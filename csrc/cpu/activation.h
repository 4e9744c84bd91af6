// Activations of float32 vectors, one type each: the value, and the value with the derivative, which shares its terms.
#pragma once

#include "../activation.h"
#include "functions.h"

namespace llmsys::cpu::LLMSYS_ISA {

struct Sloped {
  F32 value, slope;
};

struct Identity {
  static LLMSYS_INLINE F32 value(F32 x) { return x; }
  static LLMSYS_INLINE Sloped with_slope(F32 x) { return {x, splat(1.0f)}; }
};

struct ReLU {  // NaN through
  static LLMSYS_INLINE F32 value(F32 x) { return x <= 0.0f ? F32{} : x; }
  static LLMSYS_INLINE Sloped with_slope(F32 x) { return {value(x), x <= 0.0f ? F32{} : splat(1.0f)}; }
};

struct ReLU2 {
  static LLMSYS_INLINE F32 value(F32 x) { return ReLU::value(x) * ReLU::value(x); }
  static LLMSYS_INLINE Sloped with_slope(F32 x) { return {value(x), 2.0f * ReLU::value(x)}; }
};

struct SiLU {
  static LLMSYS_INLINE F32 value(F32 x) { return x * sigmoid(x); }
  static LLMSYS_INLINE Sloped with_slope(F32 x) {
    F32 s = sigmoid(x), silu = x * s;
    return {silu, multiply_add(silu, 1.0f - s, s)};
  }
};

struct GELU {
  static LLMSYS_INLINE F32 value(F32 x) { return x * normal(x).cdf; }
  static LLMSYS_INLINE Sloped with_slope(F32 x) {
    auto [cdf, bell] = normal(x);
    return {x * cdf, multiply_add(x, bell * 0.398942280f, cdf)};  // 1 / sqrt(2 pi)
  }
};

// x (1 + tanh u) / 2 with u = sqrt(2 / pi) (x + 0.044715 x^3), as x sigmoid(2 u): the same function.
struct GELUTanh {
  static LLMSYS_INLINE F32 value(F32 x) { return x * sigmoid(x * multiply_add(x * x, 0.0713548163f, 1.59576912f)); }
  static LLMSYS_INLINE Sloped with_slope(F32 x) {
    // Beyond 30 the sigmoid is 0 or 1 exactly, and x^2 must not become infinite beside a 0. NaN through.
    F32 z = x > 30.0f ? splat(30.0f) : (x < -30.0f ? splat(-30.0f) : x);
    F32 square = z * z;
    F32 s = sigmoid(z * multiply_add(square, 0.0713548163f, 1.59576912f));
    return {x * s, multiply_add(z * s * (1.0f - s), multiply_add(square, 0.214064449f, 1.59576912f), s)};
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
    case Activation::gelu:
      return visit(GELU{});
    case Activation::gelu_tanh:
      return visit(GELUTanh{});
  }
}

}  // namespace llmsys::cpu::LLMSYS_ISA
