// One vector type, as wide as the instruction set this file is compiled for; the only intrinsics of the library.
//
// Each kernel file is compiled once per instruction set, with LLMSYS_ISA naming the namespace (baseline, avx2, avx512).
// Everything here lives inside that namespace, so that no symbol compiled for a wide machine can stand in for a
// baseline one at link time. Arithmetic (+ - * /, comparisons, selection) is the compiler's vector extension;
// `a * b + c` becomes a fused multiply-add where the machine has one.
#pragma once

#include <cstdint>
#include <cstring>

#include "../dtype.h"

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

LLMSYS_INLINE F32 splat(float value) { return value - F32{}; }
LLMSYS_INLINE U32 splat(uint32_t value) { return value - U32{}; }

LLMSYS_INLINE F32 as_f32(U32 bits) { return reinterpret_cast<F32>(bits); }
LLMSYS_INLINE U32 as_u32(F32 value) { return reinterpret_cast<U32>(value); }

LLMSYS_INLINE F32 select(I32 mask, F32 yes, F32 no) { return mask ? yes : no; }
LLMSYS_INLINE U32 select(I32 mask, U32 yes, U32 no) { return mask ? yes : no; }
LLMSYS_INLINE F32 min(F32 a, F32 b) { return a < b ? a : b; }
LLMSYS_INLINE F32 max(F32 a, F32 b) { return a > b ? a : b; }
LLMSYS_INLINE U32 max(U32 a, U32 b) { return a > b ? a : b; }

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

// ---- 16-bit formats to and from float32, round to nearest even ----

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

LLMSYS_INLINE U32 to_bits(bfloat16, F32 value) {
  U32 bits = as_u32(value);
  U32 rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  // Adding could carry a NaN into infinity: keep its sign and make it quiet.
  return select(value == value, rounded, bits | 0x400000u) >> 16;
}

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

// ---- loads and stores: any alignment; the `count` forms touch `count` elements only ----

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

template <class T>
LLMSYS_INLINE F32 load(const T* p, int count) {
  T lanes[kLanes] = {};
  memcpy(lanes, p, count * sizeof(T));
  return load(lanes);
}

LLMSYS_INLINE void store(float* p, F32 value) { memcpy(p, &value, sizeof value); }

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

// Stores a pair of vectors, each element below 2^8, as bytes.
LLMSYS_INLINE void store_pair(uint8_t* p, U32 low, U32 high) {
#if LLMSYS_AVX512
  const __m128i halves[2] = {_mm512_cvtepi32_epi8(reinterpret_cast<__m512i>(low)),
                             _mm512_cvtepi32_epi8(reinterpret_cast<__m512i>(high))};
  memcpy(p, halves, sizeof halves);
#elif defined(__AVX2__)
  const __m256i both = reinterpret_cast<__m256i>(narrow_pair(low, high));
  const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(both), _mm256_extracti128_si256(both, 1));
  memcpy(p, &bytes, sizeof bytes);
#else
  const U8 halves[2] = {__builtin_convertvector(low, U8), __builtin_convertvector(high, U8)};
  memcpy(p, halves, sizeof halves);
#endif
}

LLMSYS_INLINE void prefetch(const void* p) { __builtin_prefetch(p); }

// ---- functions ----

// table[index % 8] of each element: one instruction where registers hold eight.
LLMSYS_INLINE F32 lookup(const float (&table)[8], U32 index) {
#if LLMSYS_AVX512
  const __m256 entries = _mm256_loadu_ps(table);
  return _mm512_permutexvar_ps(reinterpret_cast<__m512i>(index & 7u), _mm512_castps256_ps512(entries));
#elif defined(__AVX2__)
  return _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), reinterpret_cast<__m256i>(index));
#else
  F32 found;
  for (int i = 0; i < kLanes; ++i) found[i] = table[index[i] & 7u];
  return found;
#endif
}

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

// e^x = 2^n p, with n the integer that `shifted` holds in its low bits.
struct Exponential {
  F32 p, shifted;
};

LLMSYS_INLINE Exponential exp_parts(F32 x) {
  // n = round(x / ln 2): adding 1.5 * 2^23 leaves the integer in the low bits.
  F32 shifted = x * 1.44269504f + 12582912.0f;
  F32 n = shifted - 12582912.0f;
  // r = x - n ln 2, with ln 2 in two parts so that the first product is exact.
  F32 r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  // Minimax polynomial of e^r on [-ln2/2, ln2/2]; coefficients as in Cephes expf (Moshier 1989).
  F32 p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return {p * (r * r) + r + 1.0f, shifted};
}

// exp where some result is subnormal, zero, infinite or NaN: 2^n takes two factors.
static __attribute__((noinline)) F32 exp_anywhere(F32 x) {
  // Outside this range the result is 0 or infinity already; the comparisons let NaN pass.
  auto [p, shifted] = exp_parts(x < -104.0f ? splat(-104.0f) : (x > 89.0f ? splat(89.0f) : x));
  I32 n = reinterpret_cast<I32>(as_u32(shifted) - 0x4b400000u);
  I32 half = n >> 1;
  F32 scale_half = as_f32(reinterpret_cast<U32>((half + 127) << 23));
  F32 scale_rest = as_f32(reinterpret_cast<U32>((n - half + 127) << 23));
  return p * scale_half * scale_rest;
}

// e^x to within 2 ulp, over all of float32: subnormal results, overflow to infinity, NaN through.
LLMSYS_INLINE F32 exp(F32 x) {
  F32 magnitude = as_f32(as_u32(x) & 0x7fffffffu);
  if (__builtin_expect(!all(magnitude < 87.0f), 0)) return exp_anywhere(x);
  auto [p, shifted] = exp_parts(x);
  return as_f32(as_u32(p) + (as_u32(shifted) << 23));  // add n to p's exponent
}

// 1 / (1 + e^-x): exact limits at both ends, never NaN from a finite or infinite x.
LLMSYS_INLINE F32 sigmoid(F32 x) { return 1.0f / (1.0f + exp(-x)); }

// Calls body(offset) for whole pairs of vectors, then tail(offset, count) for what is left, a vector at most at a time.
template <class Body, class Tail>
LLMSYS_INLINE void for_each_pair(int64_t size, Body body, Tail tail) {
  int64_t offset = 0;
  for (; offset + 2 * kLanes <= size; offset += 2 * kLanes) body(offset);
  for (; offset < size; offset += kLanes) tail(offset, size - offset < kLanes ? int(size - offset) : kLanes);
}

// The sum over [0, size) of term(offset), a vector, and of tail(offset, count), a vector whose other lanes are zero.
// Summed in short runs, then over the runs, then over the lanes in double: the error grows with the logarithm of size
// in practice, and the order, so the bits, depends on size and the vector's width alone.
template <class Term, class Tail>
LLMSYS_INLINE double sum_over(int64_t size, Term term, Tail tail) {
  constexpr int64_t kStep = 4 * kLanes, kRun = 16 * kStep;
  F32 total = {};
  int64_t offset = 0;
  for (const int64_t whole = size - size % kStep; offset < whole;) {
    const int64_t end = whole - offset < kRun ? whole : offset + kRun;
    F32 parts[4] = {};
    for (; offset < end; offset += kStep)
      for (int i = 0; i < 4; ++i) parts[i] = parts[i] + term(offset + i * kLanes);
    total = total + ((parts[0] + parts[1]) + (parts[2] + parts[3]));
  }
  for (; offset + kLanes <= size; offset += kLanes) total = total + term(offset);
  if (offset < size) total = total + tail(offset, int(size - offset));
  double sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += total[i];
  return sum;
}

}  // namespace llmsys::cpu::LLMSYS_ISA
