// Functions of float32 vectors: exp and what is made of it, the normal distribution, tanh.
#pragma once

#include "simd.h"

namespace llmsys::cpu::LLMSYS_ISA {

// The bits of 2^(k/8) less k << 20, for k = n mod 8: add n << 20 for those of 2^(n/8).
LLMSYS_INLINE U32 eighth_powers(U32 n) {
  static constexpr float kTable[8] = {0x1p+0f,        0x1.f72b84p-1f, 0x1.f06fep-1f,  0x1.ebfdaep-1f,
                                      0x1.ea09e6p-1f, 0x1.eace54p-1f, 0x1.ee89fap-1f, 0x1.f5818ep-1f};
  return as_u32(lookup(kTable, n));
}

// e^x = 2^(n/8) (1 + q), with the integer n in the low bits of `shifted`.
struct Exponential {
  F32 q;
  U32 shifted;
};

// e^r - 1 for |r| <= ln2/16, the last two coefficients fitted for the least relative error: 0.2 ulp.
LLMSYS_INLINE F32 exp_polynomial(F32 r) { return multiply_add(multiply_add(r, 0.166668579f, 0.500064552f), r * r, r); }

LLMSYS_INLINE Exponential exp_parts(F32 x) {
  // n = round(8 x / ln 2): adding 1.5 * 2^23 leaves the integer in the low bits.
  F32 shifted = multiply_add(x, 11.5415602f, 12582912.0f);
  F32 n = shifted - 12582912.0f;
  // r = x - n ln2/8, with ln2/8 in two parts so that the first product is exact.
  return {exp_polynomial(multiply_add(n, 2.65243045e-5f, multiply_add(n, -0.086669921875f, x))), as_u32(shifted)};
}

// 2^(n/8) (1 + q) where that is neither subnormal nor infinite.
LLMSYS_INLINE F32 scaled_between(Exponential parts) {
  F32 power = as_f32(eighth_powers(parts.shifted) + (parts.shifted << 20));
  return multiply_add(power, parts.q, power);
}

// The same, also where it is subnormal or infinite: 2^(n/8) takes three factors.
LLMSYS_INLINE F32 scaled_anywhere(Exponential parts) {
  F32 power = as_f32(eighth_powers(parts.shifted) + ((parts.shifted & 7u) << 20));
  I32 n = reinterpret_cast<I32>(parts.shifted - 0x4b400000u) >> 3;
  I32 half = n >> 1;
  F32 scale_half = as_f32(reinterpret_cast<U32>((half + 127) << 23));
  F32 scale_rest = as_f32(reinterpret_cast<U32>((n - half + 127) << 23));
  return multiply_add(power, parts.q, power) * scale_half * scale_rest;
}

LLMSYS_INLINE F32 exp_between(F32 x) { return scaled_between(exp_parts(x)); }

// exp where some result is subnormal, zero, infinite or NaN.
static __attribute__((noinline)) F32 exp_anywhere(F32 x) {
  // Outside this range the result is 0 or infinity already; the comparisons let NaN pass.
  return scaled_anywhere(exp_parts(x < -104.0f ? splat(-104.0f) : (x > 89.0f ? splat(89.0f) : x)));
}

// Whether e^x is exp_between for all of x: |x| < 87, or, of a block, less; a NaN is not.
LLMSYS_INLINE bool within_exp_limit(F32 x) { return all(x * x < 7569.0f); }
LLMSYS_INLINE bool within_exp_limit(Block x) {
  return all(multiply_add(x.first, x.first, x.second * x.second) < 7569.0f);
}

// e^x to within 2 ulp, over all of float32: subnormal results, overflow to infinity, NaN through.
LLMSYS_INLINE F32 exp(F32 x) { return __builtin_expect(within_exp_limit(x), 1) ? exp_between(x) : exp_anywhere(x); }
LLMSYS_INLINE Block exp(Block x) {
  if (__builtin_expect(!within_exp_limit(x), 0)) return {exp_anywhere(x.first), exp_anywhere(x.second)};
  return {exp_between(x.first), exp_between(x.second)};
}

// e^x for x <= 88 to within 2 ulp; 0 where it would be below 1.6e-38, NaN through.
LLMSYS_INLINE F32 exp_flushed(F32 x) { return select(x < -87.0f, F32{}, exp_between(x)); }

// 1 / (1 + e^-x): exact limits at both ends, never NaN from a finite or infinite x.
LLMSYS_INLINE F32 sigmoid(F32 x) { return 1.0f / (1.0f + exp(-x)); }
LLMSYS_INLINE Block sigmoid(Block x) {
  Block e = exp(Block{-x.first, -x.second});
  return {1.0f / (1.0f + e.first), 1.0f / (1.0f + e.second)};
}

// x / (1 + e^-x)
LLMSYS_INLINE F32 silu(F32 x) { return x / (1.0f + exp(-x)); }
LLMSYS_INLINE Block silu(Block x) {
  Block e = exp(Block{-x.first, -x.second});
  return {x.first / (1.0f + e.first), x.second / (1.0f + e.second)};
}

// e^(-a^2 / 2), with a^2 in two parts: its rounding alone would cost a^2 / 4 ulp.
LLMSYS_INLINE Exponential bell_parts(F32 a) {
  F32 high = as_f32(as_u32(a) & 0xfffff000u);  // 12 bits: its square is exact
  F32 low_part = -0.5f * ((a - high) * (a + high));
  F32 x = -0.5f * (high * high);
  F32 shifted = multiply_add(x + low_part, 11.5415602f, 12582912.0f);
  F32 n = shifted - 12582912.0f;
  F32 rest = multiply_add(n, -0.086669921875f, x) + multiply_add(n, 2.65243045e-5f, low_part);
  return {exp_polynomial(rest), as_u32(shifted)};
}

static __attribute__((noinline)) F32 bell_anywhere(F32 a) {
  return scaled_anywhere(bell_parts(a > 14.5f ? splat(14.5f) : a));  // it is 0 from there on; NaN through
}

// e^(-x^2 / 2) to within 2 ulp, over all of float32.
LLMSYS_INLINE F32 bell(F32 x) {
  F32 a = as_f32(as_u32(x) & 0x7fffffffu);
  if (__builtin_expect(!all(a < 13.0f), 0)) return bell_anywhere(a);
  return scaled_between(bell_parts(a));
}

// The normal distribution at x, over all of float32: P(X <= x), to within 3 ulp where x >= 0 and 7 ulp below, down to
// the smallest; and e^(-x^2 / 2), which the density is in proportion to.
struct Normal {
  F32 cdf, bell;
};

LLMSYS_INLINE Normal normal(F32 x) {
  // P(X <= -a) = bell(a) R(a); R is 0.5 at 0 and falls as 0.4 / a. A rational fit of our own, minimax in the relative
  // error on [0, 14.5], beyond which bell is 0; every coefficient is positive, so that nothing cancels.
  F32 a = as_f32(as_u32(x) & 0x7fffffffu);
  a = a > 14.5f ? splat(14.5f) : a;
  F32 above = splat(4.116327967494726e-3f);
  above = multiply_add(above, a, 4.063335433602333e-2f);
  above = multiply_add(above, a, 1.832355111837387e-1f);
  above = multiply_add(above, a, 4.3829545378685e-1f);
  above = multiply_add(above, a, 0.5f);
  F32 below = splat(1.0317984037101269e-2f);
  below = multiply_add(below, a, 1.0185915976762772e-1f);
  below = multiply_add(below, a, 4.6947160363197327e-1f);
  below = multiply_add(below, a, 1.2025046348571777f);
  below = multiply_add(below, a, 1.674475908279419f);
  below = multiply_add(below, a, 1.0f);
  F32 density = bell(x);
  F32 tail = density * above / below;
  return {x < 0.0f ? tail : 1.0f - tail, density};
}

// tanh x to within 2 ulp, over all of float32.
LLMSYS_INLINE F32 tanh(F32 x) {
  // Near 0 x + x^3 p(x^2), a minimax fit of our own on [0, 0.64]; further out by exp, from where it is 1 on clamped.
  F32 square = x * x;
  F32 p = splat(-5.591013468801975e-3f);
  p = multiply_add(p, square, 2.053881622850895e-2f);
  p = multiply_add(p, square, -5.370965600013733e-2f);
  p = multiply_add(p, square, 1.33310928940773e-1f);
  p = multiply_add(p, square, -3.3333268761634827e-1f);
  F32 near = multiply_add(p * square, x, x);
  U32 sign = as_u32(x) & 0x80000000u;
  F32 a = as_f32(as_u32(x) ^ sign);
  F32 far = 1.0f - 2.0f / (1.0f + exp(2.0f * (a > 10.0f ? splat(10.0f) : a)));
  return a < 0.625f ? near : as_f32(as_u32(far) | sign);
}

}  // namespace llmsys::cpu::LLMSYS_ISA
