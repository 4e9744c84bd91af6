// Vectors as wide as the instruction set this file is compiled for, and their arithmetic.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

// tests/avx512 runs the code for AVX-512 on machines without it.
#if defined(__AVX512F__) || defined(LLMSYS_EMULATED_AVX512)
#define LLMSYS_AVX512 1
#else
#define LLMSYS_AVX512 0
#endif

#if LLMSYS_AVX512
#define LLMSYS_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define LLMSYS_VECTOR_BYTES 32
#else
#define LLMSYS_VECTOR_BYTES 16
#endif

#define LLMSYS_INLINE inline __attribute__((always_inline))

namespace llmsys::cpu::LLMSYS_ISA {

constexpr int kLanes = LLMSYS_VECTOR_BYTES / 4;

typedef float F32 __attribute__((vector_size(LLMSYS_VECTOR_BYTES)));
typedef uint32_t U32 __attribute__((vector_size(LLMSYS_VECTOR_BYTES)));
typedef int32_t I32 __attribute__((vector_size(LLMSYS_VECTOR_BYTES)));
typedef uint16_t U16 __attribute__((vector_size(LLMSYS_VECTOR_BYTES / 2)));  // kLanes elements
typedef uint16_t U16x2 __attribute__((vector_size(LLMSYS_VECTOR_BYTES)));    // 2 * kLanes elements
typedef uint8_t U8 __attribute__((vector_size(LLMSYS_VECTOR_BYTES / 4)));    // kLanes elements

LLMSYS_INLINE F32 splat(float value) { return value - F32{}; }
LLMSYS_INLINE U32 splat(uint32_t value) { return value - U32{}; }

LLMSYS_INLINE F32 as_f32(U32 bits) { return reinterpret_cast<F32>(bits); }
LLMSYS_INLINE U32 as_u32(F32 value) { return reinterpret_cast<U32>(value); }

LLMSYS_INLINE F32 select(I32 mask, F32 yes, F32 no) { return mask ? yes : no; }
LLMSYS_INLINE U32 select(I32 mask, U32 yes, U32 no) { return mask ? yes : no; }
LLMSYS_INLINE U32 max(U32 a, U32 b) { return a > b ? a : b; }

// a < b ? a : b, so b where one is NaN. GCC makes two instructions of that.
LLMSYS_INLINE F32 min(F32 a, F32 b) {
#if LLMSYS_AVX512
  return _mm512_min_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_min_ps(a, b);
#elif defined(__x86_64__)
  return _mm_min_ps(a, b);
#else
  return a < b ? a : b;
#endif
}

// a > b ? a : b, so b where one is NaN.
LLMSYS_INLINE F32 max(F32 a, F32 b) {
#if LLMSYS_AVX512
  return _mm512_max_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_max_ps(a, b);
#elif defined(__x86_64__)
  return _mm_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

// a b + c, rounded once where the machine has such an instruction.
LLMSYS_INLINE F32 multiply_add(F32 a, F32 b, F32 c) {
#if LLMSYS_AVX512
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}
LLMSYS_INLINE F32 multiply_add(F32 a, F32 b, float c) { return multiply_add(a, b, splat(c)); }
LLMSYS_INLINE F32 multiply_add(F32 a, float b, F32 c) { return multiply_add(a, splat(b), c); }
LLMSYS_INLINE F32 multiply_add(F32 a, float b, float c) { return multiply_add(a, splat(b), splat(c)); }

#if defined(__AVX512BF16__)
// sum + a[0] b[0] + a[1] b[1] in each lane, of two bfloat16 each, for which subnormal numbers are 0.
LLMSYS_INLINE F32 add_products_of_pairs(F32 sum, F32 a, F32 b) {
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}
#endif

// Whether every lane of a comparison holds.
LLMSYS_INLINE bool all(I32 mask) {
#if LLMSYS_AVX512
  return _mm512_movepi32_mask(reinterpret_cast<__m512i>(mask)) == 0xffff;
#elif defined(__AVX2__)
  return _mm256_movemask_ps(reinterpret_cast<__m256>(mask)) == 0xff;
#elif defined(__x86_64__)
  return _mm_movemask_ps(reinterpret_cast<__m128>(mask)) == 0xf;
#else
  bool every = true;
  for (int i = 0; i < kLanes; ++i) every = every && mask[i];
  return every;
#endif
}

LLMSYS_INLINE F32 sqrt(F32 x) {
#if LLMSYS_AVX512
  return _mm512_sqrt_ps(x);
#elif defined(__AVX2__)
  return _mm256_sqrt_ps(x);
#elif defined(__x86_64__)
  return _mm_sqrt_ps(x);
#else
  for (int i = 0; i < kLanes; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}

typedef uint64_t U64 __attribute__((vector_size(LLMSYS_VECTOR_BYTES)));  // kLanes / 2 elements

LLMSYS_INLINE U64 splat(uint64_t value) { return value - U64{}; }

// The 64-bit products of the low halves of the lanes; what is in the high halves does not count.
LLMSYS_INLINE U64 multiply_low(U64 a, U64 b) {
#if LLMSYS_AVX512
  return reinterpret_cast<U64>(_mm512_mul_epu32(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif defined(__AVX2__)
  return reinterpret_cast<U64>(_mm256_mul_epu32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#elif defined(__x86_64__)
  return reinterpret_cast<U64>(_mm_mul_epu32(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(b)));
#else
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

}  // namespace llmsys::cpu::LLMSYS_ISA
