// Types of elements, and those of 16 bits to and from float32, rounded to nearest even.
#pragma once

#include "../../dtype.h"
#include "vectors.h"

namespace llmsys::cpu::LLMSYS_ISA {

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

// Calls visit(T{}) with the C++ type of `dtype`.
template <class Visit>
LLMSYS_INLINE void with_type(DType dtype, Visit visit) {
  switch (dtype) {
    case DType::float32:
      return visit(float{});
    case DType::bfloat16:
      return visit(bfloat16{});
    case DType::float16:
      return visit(float16{});
  }
}

LLMSYS_INLINE U32 widen(U16 bits) {
#if LLMSYS_AVX512
  return reinterpret_cast<U32>(_mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(bits)));
#elif defined(__AVX2__)
  return reinterpret_cast<U32>(_mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(bits)));
#else
  return __builtin_convertvector(bits, U32);
#endif
}

LLMSYS_INLINE U16 narrow(U32 bits) {  // every element is below 2^16
#if LLMSYS_AVX512
  return reinterpret_cast<U16>(_mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(bits)));
#elif defined(__AVX2__)
  __m256i packed = _mm256_packus_epi32(reinterpret_cast<__m256i>(bits), reinterpret_cast<__m256i>(bits));
  return reinterpret_cast<U16>(_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x88)));
#else
  return __builtin_convertvector(bits, U16);
#endif
}

// The two halves of a pair, each below 2^16, side by side.
LLMSYS_INLINE U16x2 narrow_pair(U32 low, U32 high) {
#if defined(__AVX2__) && !LLMSYS_AVX512
  __m256i packed = _mm256_packus_epi32(reinterpret_cast<__m256i>(low), reinterpret_cast<__m256i>(high));
  return reinterpret_cast<U16x2>(_mm256_permute4x64_epi64(packed, 0xd8));
#else
  U16 halves[2] = {narrow(low), narrow(high)};
  U16x2 both;
  memcpy(&both, halves, sizeof both);
  return both;
#endif
}

// The upper half of each element is its bfloat16, the lower half noise; not for NaN.
LLMSYS_INLINE U32 nearest_bfloat16(U32 bits) { return bits + 0x7fffu + ((bits >> 16) & 1u); }

// The same for any value: adding could carry a NaN into infinity, so keep its sign and make it quiet.
LLMSYS_INLINE U32 upper_bfloat16(F32 value) {
  U32 bits = as_u32(value);
  return select(value == value, nearest_bfloat16(bits), bits | 0x400000u);
}

LLMSYS_INLINE U32 to_bits(bfloat16, F32 value) { return upper_bfloat16(value) >> 16; }

LLMSYS_INLINE F32 from_bits(bfloat16, U32 bits) { return as_f32(bits << 16); }

LLMSYS_INLINE U32 to_bits(float16, F32 value) {
#if LLMSYS_AVX512
  return widen(reinterpret_cast<U16>(_mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT)));
#elif defined(__F16C__)
  return widen(reinterpret_cast<U16>(_mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT)));
#else
  U32 bits = as_u32(value);
  U32 sign = (bits >> 16) & 0x8000u;
  U32 magnitude = bits & 0x7fffffffu;
  // Normal: rebias the exponent and round the 13 bits that do not fit. Subnormal: let the adder round, by adding 0.5.
  U32 normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  U32 subnormal = as_u32(as_f32(magnitude) + 0.5f) - 0x3f000000u;
  U32 half = select(magnitude < 0x38800000u, subnormal, normal);
  half = select(magnitude >= 0x477ff000u, U32{} + 0x7c00u, half);  // rounds to 65536 or more: infinity
  half = select(magnitude > 0x7f800000u, ((magnitude >> 13) & 0x3ffu) | 0x7e00u, half);
  return half | sign;
#endif
}

LLMSYS_INLINE F32 from_bits(float16, U32 bits) {
#if LLMSYS_AVX512
  return _mm512_cvtph_ps(reinterpret_cast<__m256i>(narrow(bits)));
#elif defined(__F16C__)
  return _mm256_cvtph_ps(reinterpret_cast<__m128i>(narrow(bits)));
#else
  U32 magnitude = bits & 0x7fffu;
  F32 scaled = as_f32(magnitude << 13) * 0x1p112f;  // exact: rebias the exponent, subnormals included
  U32 special = (magnitude << 13) | 0x7f800000u;    // infinity, NaN
  return as_f32(select(magnitude >= 0x7c00u, special, as_u32(scaled)) | ((bits & 0x8000u) << 16));
#endif
}

// One element, for the ends of loops.
LLMSYS_INLINE float to_float(float value) { return value; }
template <class Half>
LLMSYS_INLINE float to_float(Half value) {
  return from_bits(Half{}, U32{value.bits})[0];
}

// For each element of two vectors of 16-bit elements side by side, the one at its place when they are interleaved.
LLMSYS_INLINE U16x2 interleaved() {
  U16x2 index = {};
  for (int i = 0; i < 2 * kLanes; ++i) index[i] = i / 2 + i % 2 * kLanes;
  return index;
}

#if defined(__AVX512BF16__)
// Pairs of bfloat16, for which subnormal numbers are 0: of consecutive elements, those of `low` first.
LLMSYS_INLINE F32 consecutive_pairs(F32 low, F32 high) { return reinterpret_cast<F32>(_mm512_cvtne2ps_pbh(high, low)); }
// Of the elements at one place of both.
LLMSYS_INLINE F32 pairs_of(F32 first, F32 second) {
  const __m512i halves = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first));
  return reinterpret_cast<F32>(_mm512_permutexvar_epi16(reinterpret_cast<__m512i>(interleaved()), halves));
}

// Whether one is a subnormal number, which the instructions for bfloat16 take for zero; all others round as elsewhere.
LLMSYS_INLINE bool any_subnormal(F32 a, F32 b) {
  return !_kortestz_mask16_u8(_mm512_fpclass_ps_mask(a, 0x20), _mm512_fpclass_ps_mask(b, 0x20));
}
#endif

}  // namespace llmsys::cpu::LLMSYS_ISA
