// What goes from lane to lane: shuffles, small tables, the largest lane.
#pragma once

#include "vectors.h"

namespace llmsys::cpu::LLMSYS_ISA {

// Element i of the result is element index(i) of a and b side by side.
template <class Index>
LLMSYS_INLINE F32 picked(F32 a, F32 b, Index index) {
#if defined(__clang__)
  F32 result = a;
  for (int i = 0; i < kLanes; ++i) result[i] = index(i) < kLanes ? a[index(i)] : b[index(i) - kLanes];
  return result;
#else
  I32 indices = {};
  for (int i = 0; i < kLanes; ++i) indices[i] = index(i);
  return __builtin_shuffle(a, b, indices);
#endif
}

// table[index % 8] of each element: one instruction where registers hold eight.
LLMSYS_INLINE F32 lookup(const float (&table)[8], U32 index) {
#if LLMSYS_AVX512
  return _mm512_permutexvar_ps(reinterpret_cast<__m512i>(index), _mm512_broadcast_f32x8(_mm256_loadu_ps(table)));
#elif defined(__AVX2__)
  return _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), reinterpret_cast<__m256i>(index));
#else
  F32 found;
  for (int i = 0; i < kLanes; ++i) found[i] = table[index[i] & 7u];
  return found;
#endif
}

// table[index % 16] of each element.
LLMSYS_INLINE U32 lookup(const uint32_t (&table)[16], U32 index) {
#if LLMSYS_AVX512
  return reinterpret_cast<U32>(_mm512_permutexvar_epi32(reinterpret_cast<__m512i>(index), _mm512_loadu_si512(table)));
#elif defined(__AVX2__)
  const auto eight = [&](int first) {
    const __m256i entries = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(table + first));
    return _mm256_castsi256_ps(_mm256_permutevar8x32_epi32(entries, reinterpret_cast<__m256i>(index)));
  };
  const __m256 upper = _mm256_castsi256_ps(reinterpret_cast<__m256i>(index << 28));  // its signs: index & 8
  return reinterpret_cast<U32>(_mm256_blendv_ps(eight(0), eight(8), upper));
#else
  U32 found;
  for (int i = 0; i < kLanes; ++i) found[i] = table[index[i] & 15u];
  return found;
#endif
}

// The first `count` lanes of value, and `otherwise` in the others.
LLMSYS_INLINE F32 first_lanes(int count, F32 value, float otherwise) {
  I32 index;
  for (int i = 0; i < kLanes; ++i) index[i] = i;
  return select(index < count, value, splat(otherwise));
}

template <int kHalf = kLanes / 2>
LLMSYS_INLINE uint32_t max_lane(U32 x) {
  if constexpr (kHalf > 0) {
    const F32 other = picked(as_f32(x), as_f32(x), [](int i) { return (i + kHalf) % kLanes; });
    return max_lane<kHalf / 2>(max(x, as_u32(other)));
  }
  return x[0];
}

// The largest lane; NaN is passed over where another lane is none.
LLMSYS_INLINE float max_lane(F32 x) {
  float highest = x[0];
  for (int i = 1; i < kLanes; ++i) highest = x[i] > highest ? x[i] : highest;
  return highest;
}

// The even lanes of both (a0, b0, a2, b2, ...), and the odd ones.
LLMSYS_INLINE U64 even_lanes(U64 a, U64 b) {
#if LLMSYS_AVX512
  return reinterpret_cast<U64>(_mm512_unpacklo_epi64(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif defined(__AVX2__)
  return reinterpret_cast<U64>(_mm256_unpacklo_epi64(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#elif defined(__x86_64__)
  return reinterpret_cast<U64>(_mm_unpacklo_epi64(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(b)));
#else
  for (int lane = 1; lane < kLanes / 2; lane += 2) a[lane] = b[lane - 1];
  return a;
#endif
}
LLMSYS_INLINE U64 odd_lanes(U64 a, U64 b) {
#if LLMSYS_AVX512
  return reinterpret_cast<U64>(_mm512_unpackhi_epi64(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif defined(__AVX2__)
  return reinterpret_cast<U64>(_mm256_unpackhi_epi64(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#elif defined(__x86_64__)
  return reinterpret_cast<U64>(_mm_unpackhi_epi64(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(b)));
#else
  for (int lane = 0; lane < kLanes / 2; lane += 2) b[lane] = a[lane + 1];
  return b;
#endif
}

}  // namespace llmsys::cpu::LLMSYS_ISA
