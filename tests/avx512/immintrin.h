// Found before the compiler's own, so that the code for AVX-512 runs on a machine without it: the AVX-512 intrinsics
// that csrc/cpu uses, on vectors of 64 bytes, which the compiler keeps in pairs of AVX2 registers.
//
// One that is missing here does not compile: GCC inlines its own only into code for AVX-512. Every instruction below
// works lane by lane, or on each 16-bit lane's own source, so two halves done by AVX2 are exactly the whole.
#pragma once

#include_next <immintrin.h>

#include <cstdint>
#include <cstring>

namespace emulated_avx512 {

#define LLMSYS_EMULATED static inline __attribute__((always_inline))

typedef uint8_t Lanes8 __attribute__((vector_size(16)));
typedef uint16_t Lanes16 __attribute__((vector_size(32)));
typedef uint32_t Lanes32 __attribute__((vector_size(64)));

template <class Whole, class Half>
LLMSYS_EMULATED Half half(const Whole& whole, int which) {
  static_assert(sizeof(Whole) == 2 * sizeof(Half));
  Half result;
  memcpy(&result, reinterpret_cast<const char*>(&whole) + which * sizeof result, sizeof result);
  return result;
}

template <class Whole, class Half>
LLMSYS_EMULATED Whole join(Half low, Half high) {
  static_assert(sizeof(Whole) == 2 * sizeof(Half));
  Half halves[2] = {low, high};
  Whole result;
  memcpy(&result, halves, sizeof result);
  return result;
}

LLMSYS_EMULATED __m512 sqrt_ps(__m512 x) {
  return join<__m512>(_mm256_sqrt_ps(half<__m512, __m256>(x, 0)), _mm256_sqrt_ps(half<__m512, __m256>(x, 1)));
}

LLMSYS_EMULATED __m512 fmadd_ps(__m512 a, __m512 b, __m512 c) {
  return join<__m512>(
      _mm256_fmadd_ps(half<__m512, __m256>(a, 0), half<__m512, __m256>(b, 0), half<__m512, __m256>(c, 0)),
      _mm256_fmadd_ps(half<__m512, __m256>(a, 1), half<__m512, __m256>(b, 1), half<__m512, __m256>(c, 1)));
}

LLMSYS_EMULATED __m512 min_ps(__m512 a, __m512 b) {
  return join<__m512>(_mm256_min_ps(half<__m512, __m256>(a, 0), half<__m512, __m256>(b, 0)),
                      _mm256_min_ps(half<__m512, __m256>(a, 1), half<__m512, __m256>(b, 1)));
}

LLMSYS_EMULATED __m512 max_ps(__m512 a, __m512 b) {
  return join<__m512>(_mm256_max_ps(half<__m512, __m256>(a, 0), half<__m512, __m256>(b, 0)),
                      _mm256_max_ps(half<__m512, __m256>(a, 1), half<__m512, __m256>(b, 1)));
}

LLMSYS_EMULATED __m512 cvtph_ps(__m256i x) {
  return join<__m512>(_mm256_cvtph_ps(half<__m256i, __m128i>(x, 0)), _mm256_cvtph_ps(half<__m256i, __m128i>(x, 1)));
}

template <int kRounding>
LLMSYS_EMULATED __m256i cvtps_ph(__m512 x) {
  return join<__m256i>(_mm256_cvtps_ph(half<__m512, __m256>(x, 0), kRounding),
                       _mm256_cvtps_ph(half<__m512, __m256>(x, 1), kRounding));
}

LLMSYS_EMULATED __m512i cvtepu16_epi32(__m256i x) {
  Lanes16 from = reinterpret_cast<Lanes16>(x);
  Lanes32 to;
  for (int i = 0; i < 16; ++i) to[i] = from[i];
  return reinterpret_cast<__m512i>(to);
}

LLMSYS_EMULATED __m256i cvtepi32_epi16(__m512i x) {  // keeps the low bits: does not saturate
  Lanes32 from = reinterpret_cast<Lanes32>(x);
  Lanes16 to;
  for (int i = 0; i < 16; ++i) to[i] = uint16_t(from[i]);
  return reinterpret_cast<__m256i>(to);
}

LLMSYS_EMULATED __m128i cvtepi32_epi8(__m512i x) {  // keeps the low bits: does not saturate
  Lanes32 from = reinterpret_cast<Lanes32>(x);
  Lanes8 to;
  for (int i = 0; i < 16; ++i) to[i] = uint8_t(from[i]);
  return reinterpret_cast<__m128i>(to);
}

// On each half alike: `function` is AVX2's.
template <class Function>
LLMSYS_EMULATED __m512i by_halves(__m512i x, __m512i y, Function function) {
  return join<__m512i>(function(half<__m512i, __m256i>(x, 0), half<__m512i, __m256i>(y, 0)),
                       function(half<__m512i, __m256i>(x, 1), half<__m512i, __m256i>(y, 1)));
}

LLMSYS_EMULATED __m512i mul_epu32(__m512i x, __m512i y) {
  return by_halves(x, y, [](__m256i a, __m256i b) { return _mm256_mul_epu32(a, b); });
}

LLMSYS_EMULATED __m512i unpacklo_epi64(__m512i x, __m512i y) {
  return by_halves(x, y, [](__m256i a, __m256i b) { return _mm256_unpacklo_epi64(a, b); });
}

LLMSYS_EMULATED __m512i unpackhi_epi64(__m512i x, __m512i y) {
  return by_halves(x, y, [](__m256i a, __m256i b) { return _mm256_unpackhi_epi64(a, b); });
}

LLMSYS_EMULATED __m512i cvtepu8_epi32(__m128i x) {
  Lanes8 from = reinterpret_cast<Lanes8>(x);
  Lanes32 to;
  for (int i = 0; i < 16; ++i) to[i] = from[i];
  return reinterpret_cast<__m512i>(to);
}

LLMSYS_EMULATED __m512i cvtepi8_epi32(__m128i x) {
  Lanes8 from = reinterpret_cast<Lanes8>(x);
  Lanes32 to;
  for (int i = 0; i < 16; ++i) to[i] = uint32_t(int8_t(from[i]));
  return reinterpret_cast<__m512i>(to);
}

LLMSYS_EMULATED __m512 permutexvar_ps(__m512i index, __m512 table) {
  Lanes32 at = reinterpret_cast<Lanes32>(index), entries = reinterpret_cast<Lanes32>(table), found;
  for (int i = 0; i < 16; ++i) found[i] = entries[at[i] & 15];
  return reinterpret_cast<__m512>(found);
}

LLMSYS_EMULATED __m512i permutexvar_epi32(__m512i index, __m512i table) {
  return reinterpret_cast<__m512i>(permutexvar_ps(index, reinterpret_cast<__m512>(table)));
}

LLMSYS_EMULATED __m512 broadcast_f32x8(__m256 half) { return join<__m512>(half, half); }

LLMSYS_EMULATED __m512 broadcast_f32x4(__m128 quarter) { return broadcast_f32x8(join<__m256>(quarter, quarter)); }

LLMSYS_EMULATED __m512i loadu_si512(const void* from) {
  __m512i value;
  memcpy(&value, from, sizeof value);
  return value;
}

LLMSYS_EMULATED __m512i packs_epi32(__m512i x, __m512i y) {  // in each 16 bytes
  return by_halves(x, y, [](__m256i a, __m256i b) { return _mm256_packs_epi32(a, b); });
}

LLMSYS_EMULATED __m512i packus_epi16(__m512i x, __m512i y) {
  return by_halves(x, y, [](__m256i a, __m256i b) { return _mm256_packus_epi16(a, b); });
}

LLMSYS_EMULATED __mmask16 movepi32_mask(__m512i x) {
  const int low = _mm256_movemask_ps(_mm256_castsi256_ps(half<__m512i, __m256i>(x, 0)));
  const int high = _mm256_movemask_ps(_mm256_castsi256_ps(half<__m512i, __m256i>(x, 1)));
  return __mmask16(low | high << 8);
}

template <int kPredicate>
LLMSYS_EMULATED __mmask16 cmp_ps_mask(__m512 a, __m512 b) {
  const __m256 low = _mm256_cmp_ps(half<__m512, __m256>(a, 0), half<__m512, __m256>(b, 0), kPredicate);
  const __m256 high = _mm256_cmp_ps(half<__m512, __m256>(a, 1), half<__m512, __m256>(b, 1), kPredicate);
  return __mmask16(_mm256_movemask_ps(low) | _mm256_movemask_ps(high) << 8);
}

LLMSYS_EMULATED void stream_si512(__m512i* p, __m512i x) {
  if (reinterpret_cast<uintptr_t>(p) % 64) __builtin_trap();  // as the instruction does
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), half<__m512i, __m256i>(x, 0));
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p) + 1, half<__m512i, __m256i>(x, 1));
}

}  // namespace emulated_avx512

#undef _mm512_cvtps_ph
#undef _mm512_cmp_ps_mask
#define _mm512_cvtps_ph(x, rounding) emulated_avx512::cvtps_ph<(rounding)>(x)
#define _mm512_cvtph_ps emulated_avx512::cvtph_ps
#define _mm512_cvtepu16_epi32 emulated_avx512::cvtepu16_epi32
#define _mm512_cvtepi32_epi16 emulated_avx512::cvtepi32_epi16
#define _mm512_cvtepi32_epi8 emulated_avx512::cvtepi32_epi8
#define _mm512_cmp_ps_mask(a, b, predicate) emulated_avx512::cmp_ps_mask<(predicate)>(a, b)
#define _mm512_mul_epu32 emulated_avx512::mul_epu32
#define _mm512_broadcast_f32x8 emulated_avx512::broadcast_f32x8
#define _mm512_broadcast_f32x4 emulated_avx512::broadcast_f32x4
#define _mm512_cvtepi8_epi32 emulated_avx512::cvtepi8_epi32
#define _mm512_cvtepu8_epi32 emulated_avx512::cvtepu8_epi32
#define _mm512_fmadd_ps emulated_avx512::fmadd_ps
#define _mm512_loadu_si512 emulated_avx512::loadu_si512
#define _mm512_max_ps emulated_avx512::max_ps
#define _mm512_min_ps emulated_avx512::min_ps
#define _mm512_movepi32_mask emulated_avx512::movepi32_mask
#define _mm512_packs_epi32 emulated_avx512::packs_epi32
#define _mm512_packus_epi16 emulated_avx512::packus_epi16
#define _mm512_permutexvar_epi32 emulated_avx512::permutexvar_epi32
#define _mm512_permutexvar_ps emulated_avx512::permutexvar_ps
#define _mm512_sqrt_ps emulated_avx512::sqrt_ps
#define _mm512_stream_si512 emulated_avx512::stream_si512
#define _mm512_unpackhi_epi64 emulated_avx512::unpackhi_epi64
#define _mm512_unpacklo_epi64 emulated_avx512::unpacklo_epi64
