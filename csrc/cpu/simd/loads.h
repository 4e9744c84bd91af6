// Loads and stores, at any alignment: the `count` forms touch `count` elements only. Past the caches, too, and ahead.
#pragma once

#include "conversions.h"

namespace llmsys::cpu::LLMSYS_ISA {

LLMSYS_INLINE F32 load(const float* p) {
  F32 value;
  memcpy(&value, p, sizeof value);
  return value;
}

template <class Half>
LLMSYS_INLINE F32 load(const Half* p) {
  U16 bits;
  memcpy(&bits, p, sizeof bits);
#if LLMSYS_AVX512
  if constexpr (__is_same(Half, float16)) return _mm512_cvtph_ps(reinterpret_cast<__m256i>(bits));
#elif defined(__F16C__)
  if constexpr (__is_same(Half, float16)) return _mm256_cvtph_ps(reinterpret_cast<__m128i>(bits));
#endif
  return from_bits(Half{}, widen(bits));
}

LLMSYS_INLINE F32 load(const int8_t* p) {
  int8_t bytes __attribute__((vector_size(kLanes)));
  memcpy(&bytes, p, sizeof bytes);
#if LLMSYS_AVX512
  return __builtin_convertvector(reinterpret_cast<I32>(_mm512_cvtepi8_epi32(reinterpret_cast<__m128i>(bytes))), F32);
#elif defined(__AVX2__)
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(&bytes))));
#else
  return __builtin_convertvector(bytes, F32);
#endif
}

template <class T>
LLMSYS_INLINE F32 load(const T* p, int count) {
  T lanes[kLanes] = {};
  memcpy(lanes, p, count * sizeof(T));
  return load(lanes);
}

// kRun elements, again and again: half a vector or less.
template <int kRun>
LLMSYS_INLINE F32 load_repeated(const float* p) {
  static_assert(kRun == 2 || kRun == 4 || kRun == 8);
#if LLMSYS_AVX512
  if constexpr (kRun == 8) return _mm512_broadcast_f32x8(_mm256_loadu_ps(p));
  if constexpr (kRun == 4) return _mm512_broadcast_f32x4(_mm_loadu_ps(p));
#elif defined(__AVX2__)
  if constexpr (kRun == 4) return _mm256_broadcast_ps(reinterpret_cast<const __m128*>(p));
#endif
  double pair;
  memcpy(&pair, p, sizeof pair);
  typedef double F64 __attribute__((vector_size(LLMSYS_VECTOR_BYTES)));
  return reinterpret_cast<F32>(pair - F64{});
}

LLMSYS_INLINE void store(float* p, F32 value) { memcpy(p, &value, sizeof value); }

// Each of [-128, 127], rounded to nearest even by a sum whose lowest bits are then the integer. GCC 12 takes the
// vectors apart for its own conversion to bytes.
LLMSYS_INLINE void store(int8_t* p, F32 value) {
  const U32 bits = as_u32(value + 0x1.8p23f);
#if LLMSYS_AVX512
  const __m128i bytes = _mm512_cvtepi32_epi8(reinterpret_cast<__m512i>(bits));
#elif defined(__AVX2__)
  const __m256i words = _mm256_packs_epi32(reinterpret_cast<__m256i>(bits & 0xffu), __m256i{});
  const __m256i quarters = _mm256_packus_epi16(words, words);
  const __m128i bytes = _mm_unpacklo_epi32(_mm256_castsi256_si128(quarters), _mm256_extracti128_si256(quarters, 1));
#elif defined(__x86_64__)
  const __m128i words = _mm_packs_epi32(reinterpret_cast<__m128i>(bits & 0xffu), __m128i{});
  const __m128i bytes = _mm_packus_epi16(words, words);
#else
  const U8 bytes = __builtin_convertvector(bits, U8);
#endif
  memcpy(p, &bytes, kLanes);
}

template <class Half>
LLMSYS_INLINE void store(Half* p, F32 value) {
  U16 bits = narrow(to_bits(Half{}, value));
  memcpy(p, &bits, sizeof bits);
}

template <class T>
LLMSYS_INLINE void store(T* p, F32 value, int count) {
  T lanes[kLanes];
  store(lanes, value);
  memcpy(p, lanes, count * sizeof(T));
}

// `count` elements, a whole vector in the common case.
template <class T>
LLMSYS_INLINE F32 load_some(const T* p, int count) {
  return count == kLanes ? load(p) : load(p, count);
}
template <class T>
LLMSYS_INLINE void store_some(T* p, F32 value, int count) {
  count == kLanes ? store(p, value) : store(p, value, count);
}

// Stores a pair of vectors, past the caches when `kStream`: then p must be aligned to LLMSYS_VECTOR_BYTES.
template <bool kStream, class Vector>
LLMSYS_INLINE void store_vector(void* p, Vector value) {
  if constexpr (kStream) {
#if LLMSYS_AVX512
    _mm512_stream_si512(static_cast<__m512i*>(p), reinterpret_cast<__m512i>(value));
    return;
#elif defined(__AVX2__)
    _mm256_stream_si256(static_cast<__m256i*>(p), reinterpret_cast<__m256i>(value));
    return;
#elif defined(__x86_64__)
    _mm_stream_si128(static_cast<__m128i*>(p), reinterpret_cast<__m128i>(value));
    return;
#endif
  }
  memcpy(p, &value, sizeof value);
}

template <bool kStream>
LLMSYS_INLINE void store_pair(float* p, F32 low, F32 high) {
  store_vector<kStream>(p, low);
  store_vector<kStream>(p + kLanes, high);
}

template <bool kStream, class Half>
LLMSYS_INLINE void store_pair(Half* p, F32 low, F32 high) {
#if defined(__AVX512BF16__)
  if constexpr (__is_same(Half, bfloat16))
    if (__builtin_expect(!any_subnormal(low, high), 1))
      return store_vector<kStream>(p, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low)));
#endif
  store_vector<kStream>(p, narrow_pair(to_bits(Half{}, low), to_bits(Half{}, high)));
}

// Streamed stores are weakly ordered: a fence before another thread may read them.
LLMSYS_INLINE void stream_fence() {
#if defined(__x86_64__)
  _mm_sfence();
#endif
}

// Bytes, each as an element of 32 bits.
LLMSYS_INLINE U32 load(const uint8_t* p) {
  U8 bytes;
  memcpy(&bytes, p, sizeof bytes);
#if LLMSYS_AVX512
  return reinterpret_cast<U32>(_mm512_cvtepu8_epi32(reinterpret_cast<__m128i>(bytes)));
#elif defined(__AVX2__)
  return reinterpret_cast<U32>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(&bytes))));
#else
  return __builtin_convertvector(bytes, U32);
#endif
}

// Stores four vectors of `values` + shift, each below 2^15, as bytes: what is below 0 as 0, above 255 as 255.
LLMSYS_INLINE void store_bytes(uint8_t* p, const I32 (&values)[4], int16_t shift) {
#if LLMSYS_AVX512
  const auto words = [&](int i) {
    const __m512i both =
        _mm512_packs_epi32(reinterpret_cast<__m512i>(values[i]), reinterpret_cast<__m512i>(values[i + 1]));
    return reinterpret_cast<__m512i>(reinterpret_cast<U16x2>(both) + uint16_t(shift));
  };
  const I32 order = {0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15};  // packs go by 16 bytes
  const __m512i bytes = _mm512_packus_epi16(words(0), words(2));
  store_vector<false>(p, _mm512_permutexvar_epi32(reinterpret_cast<__m512i>(order), bytes));
#elif defined(__AVX2__)
  const auto words = [&](int i) {
    const __m256i both =
        _mm256_packs_epi32(reinterpret_cast<__m256i>(values[i]), reinterpret_cast<__m256i>(values[i + 1]));
    return reinterpret_cast<__m256i>(reinterpret_cast<U16x2>(both) + uint16_t(shift));
  };
  const I32 order = {0, 4, 1, 5, 2, 6, 3, 7};
  const __m256i bytes = _mm256_packus_epi16(words(0), words(2));
  store_vector<false>(p, _mm256_permutevar8x32_epi32(bytes, reinterpret_cast<__m256i>(order)));
#else
  for (int i = 0; i < 4; ++i) {
    I32 clamped = values[i] + int32_t(shift);
    clamped = clamped < 0 ? I32{} : clamped;
    clamped = clamped > 255 ? I32{} + 255 : clamped;
    const U8 bytes = __builtin_convertvector(clamped, U8);
    memcpy(p + i * kLanes, &bytes, sizeof bytes);
  }
#endif
}

LLMSYS_INLINE void prefetch(const void* p) { __builtin_prefetch(p); }
LLMSYS_INLINE void prefetch_later(const void* p) { __builtin_prefetch(p, 0, 2); }  // not into the first-level cache

}  // namespace llmsys::cpu::LLMSYS_ISA
