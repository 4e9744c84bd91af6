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

// a b + c, rounded once where the machine has such an instruction: always this product, where `a * b + d * e` leaves
// the choice to the compiler.
LLMSYS_INLINE F32 multiply_add(F32 a, F32 b, F32 c) {
#if LLMSYS_AVX512
  return _mm512_fmadd_ps(a, b, c);
#elif defined(__FMA__)
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
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
  store_vector<kStream>(p, narrow_pair(to_bits(Half{}, low), to_bits(Half{}, high)));
}

// ---- blocks: two vectors of consecutive elements, in the order that costs least to load and store ----

struct Block {
  F32 first, second;
};

// halves: the first kLanes elements, then the others. alternate: the even elements, then the odd ones, which is how
// bfloat16 widens and narrows by shifts and masks alone.
enum class Order { halves, alternate };

// The order for a loop whose outputs and largest inputs are of T.
template <class T>
constexpr Order order_of = __is_same(T, bfloat16) ? Order::alternate : Order::halves;

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

// The even and the odd elements of two consecutive vectors, and back.
LLMSYS_INLINE Block alternated(F32 low, F32 high) {
  return {picked(low, high, [](int i) { return 2 * i; }), picked(low, high, [](int i) { return 2 * i + 1; })};
}
LLMSYS_INLINE Block halved(Block block) {
  auto first = [](int i) { return i / 2 + i % 2 * kLanes; };
  return {picked(block.first, block.second, first),
          picked(block.first, block.second, [=](int i) { return first(i) + kLanes / 2; })};
}

template <Order kOrder, class T>
LLMSYS_INLINE Block load_block(const T* p) {
  if constexpr (kOrder == Order::alternate && __is_same(T, bfloat16)) {
    U32 pairs;
    memcpy(&pairs, p, sizeof pairs);
    return {as_f32(pairs << 16), as_f32(pairs & 0xffff0000u)};
  } else {
    F32 low = load(p), high = load(p + kLanes);
    return kOrder == Order::alternate ? alternated(low, high) : Block{low, high};
  }
}

LLMSYS_INLINE bool any_nan(Block block) {
#if LLMSYS_AVX512
  return _mm512_cmp_ps_mask(block.first, block.second, _CMP_UNORD_Q) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_ps(_mm256_cmp_ps(block.first, block.second, _CMP_UNORD_Q)) != 0;
#else
  return !all((block.first == block.first) & (block.second == block.second));
#endif
}

template <Order kOrder, bool kStream, class T>
LLMSYS_INLINE void store_block(T* p, Block block) {
  if constexpr (kOrder == Order::alternate && __is_same(T, bfloat16)) {
    U32 even = nearest_bfloat16(as_u32(block.first)), odd = nearest_bfloat16(as_u32(block.second));
    if (__builtin_expect(any_nan(block), 0)) even = upper_bfloat16(block.first), odd = upper_bfloat16(block.second);
#if defined(__AVX2__) && !LLMSYS_AVX512
    store_vector<kStream>(
        p, _mm256_blend_epi16(reinterpret_cast<__m256i>(even >> 16), reinterpret_cast<__m256i>(odd), 0xaa));
#else
    store_vector<kStream>(p, even >> 16 | (odd & 0xffff0000u));
#endif
  } else {
    if constexpr (kOrder == Order::alternate) block = halved(block);
    store_pair<kStream>(p, block.first, block.second);
  }
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
LLMSYS_INLINE F32 exp_polynomial(F32 r) { return (r * 0.166668579f + 0.500064552f) * (r * r) + r; }

LLMSYS_INLINE Exponential exp_parts(F32 x) {
  // n = round(8 x / ln 2): adding 1.5 * 2^23 leaves the integer in the low bits.
  F32 shifted = x * 11.5415602f + 12582912.0f;
  F32 n = shifted - 12582912.0f;
  // r = x - n ln2/8, with ln2/8 in two parts so that the first product is exact.
  return {exp_polynomial((x - n * 0.086669921875f) + n * 2.65243045e-5f), as_u32(shifted)};
}

// 2^(n/8) (1 + q) where that is neither subnormal nor infinite.
LLMSYS_INLINE F32 scaled_between(Exponential parts) {
  F32 power = as_f32(eighth_powers(parts.shifted) + (parts.shifted << 20));
  return power * parts.q + power;
}

// The same, also where it is subnormal or infinite: 2^(n/8) takes three factors.
LLMSYS_INLINE F32 scaled_anywhere(Exponential parts) {
  F32 power = as_f32(eighth_powers(parts.shifted) + ((parts.shifted & 7u) << 20));
  I32 n = reinterpret_cast<I32>(parts.shifted - 0x4b400000u) >> 3;
  I32 half = n >> 1;
  F32 scale_half = as_f32(reinterpret_cast<U32>((half + 127) << 23));
  F32 scale_rest = as_f32(reinterpret_cast<U32>((n - half + 127) << 23));
  return (power * parts.q + power) * scale_half * scale_rest;
}

LLMSYS_INLINE F32 exp_between(F32 x) { return scaled_between(exp_parts(x)); }

// exp where some result is subnormal, zero, infinite or NaN.
static __attribute__((noinline)) F32 exp_anywhere(F32 x) {
  // Outside this range the result is 0 or infinity already; the comparisons let NaN pass.
  return scaled_anywhere(exp_parts(x < -104.0f ? splat(-104.0f) : (x > 89.0f ? splat(89.0f) : x)));
}

// Whether e^x is exp_between for all of x: |x| < 87, or, of a block, less; a NaN is not.
LLMSYS_INLINE bool within_exp_limit(F32 x) { return all(x * x < 7569.0f); }
LLMSYS_INLINE bool within_exp_limit(Block x) { return all(x.first * x.first + x.second * x.second < 7569.0f); }

// e^x to within 2 ulp, over all of float32: subnormal results, overflow to infinity, NaN through.
LLMSYS_INLINE F32 exp(F32 x) { return __builtin_expect(within_exp_limit(x), 1) ? exp_between(x) : exp_anywhere(x); }
LLMSYS_INLINE Block exp(Block x) {
  if (__builtin_expect(!within_exp_limit(x), 0)) return {exp_anywhere(x.first), exp_anywhere(x.second)};
  return {exp_between(x.first), exp_between(x.second)};
}

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

// The largest lane; NaN is passed over where another lane is none.
LLMSYS_INLINE float max_lane(F32 x) {
  float highest = x[0];
  for (int i = 1; i < kLanes; ++i) highest = x[i] > highest ? x[i] : highest;
  return highest;
}

// Calls body(offset) for whole pairs of vectors, then tail(offset, count) for what is left, a vector at most at a time.
template <class Body, class Tail>
LLMSYS_INLINE void for_each_pair(int64_t size, Body body, Tail tail) {
  int64_t offset = 0;
  for (; offset + 2 * kLanes <= size; offset += 2 * kLanes) body(offset);
  for (; offset < size; offset += kLanes) tail(offset, size - offset < kLanes ? int(size - offset) : kLanes);
}

// The sum over [0, size) of term(offset), a block, and of tail(offset, count), a vector whose other lanes are zero.
// Summed in short runs, then over the runs, then over the lanes in double: the error grows with the logarithm of size
// in practice, and the order, so the bits, depends on size and the vector's width alone.
template <class Term, class Tail>
LLMSYS_INLINE double sum_over(int64_t size, Term term, Tail tail) {
  constexpr int kBlocks = 4;  // sums side by side, as an addition takes several cycles
  constexpr int64_t kBlock = 2 * kLanes, kStep = kBlocks * kBlock, kRun = 8 * kStep;
  F32 total = {};
  int64_t offset = 0;
  for (const int64_t whole = size - size % kStep; offset < whole;) {
    const int64_t end = whole - offset < kRun ? whole : offset + kRun;
    F32 parts[2 * kBlocks] = {};
    for (; offset < end; offset += kStep)
      for (int i = 0; i < kBlocks; ++i) {
        Block block = term(offset + i * kBlock);
        parts[2 * i] = parts[2 * i] + block.first;
        parts[2 * i + 1] = parts[2 * i + 1] + block.second;
      }
    for (int i = 0; i < kBlocks; ++i) total = total + (parts[2 * i] + parts[2 * i + 1]);
  }
  for (; offset + kBlock <= size; offset += kBlock) {
    Block block = term(offset);
    total = total + (block.first + block.second);
  }
  for (; offset < size; offset += kLanes) {
    const int64_t rest = size - offset;
    total = total + tail(offset, rest < kLanes ? int(rest) : kLanes);
  }
  double sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += total[i];
  return sum;
}

// ---- lanes of 64 bits ----

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

// ---- more functions ----

// e^(-a^2 / 2), with a^2 in two parts: its rounding alone would cost a^2 / 4 ulp.
LLMSYS_INLINE Exponential bell_parts(F32 a) {
  F32 high = as_f32(as_u32(a) & 0xfffff000u);  // 12 bits: its square is exact
  F32 low_part = -0.5f * ((a - high) * (a + high));
  F32 x = -0.5f * (high * high);
  F32 shifted = (x + low_part) * 11.5415602f + 12582912.0f;
  F32 n = shifted - 12582912.0f;
  return {exp_polynomial((x - n * 0.086669921875f) + (n * 2.65243045e-5f + low_part)), as_u32(shifted)};
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
  above = above * a + 4.063335433602333e-2f;
  above = above * a + 1.832355111837387e-1f;
  above = above * a + 4.3829545378685e-1f;
  above = above * a + 0.5f;
  F32 below = splat(1.0317984037101269e-2f);
  below = below * a + 1.0185915976762772e-1f;
  below = below * a + 4.6947160363197327e-1f;
  below = below * a + 1.2025046348571777f;
  below = below * a + 1.674475908279419f;
  below = below * a + 1.0f;
  F32 density = bell(x);
  F32 tail = density * above / below;
  return {x < 0.0f ? tail : 1.0f - tail, density};
}

// tanh x to within 2 ulp, over all of float32.
LLMSYS_INLINE F32 tanh(F32 x) {
  // Near 0 x + x^3 p(x^2), a minimax fit of our own on [0, 0.64]; further out by exp, from where it is 1 on clamped.
  F32 square = x * x;
  F32 p = splat(-5.591013468801975e-3f);
  p = p * square + 2.053881622850895e-2f;
  p = p * square - 5.370965600013733e-2f;
  p = p * square + 1.33310928940773e-1f;
  p = p * square - 3.3333268761634827e-1f;
  F32 near = p * square * x + x;
  U32 sign = as_u32(x) & 0x80000000u;
  F32 a = as_f32(as_u32(x) ^ sign);
  F32 far = 1.0f - 2.0f / (1.0f + exp(2.0f * (a > 10.0f ? splat(10.0f) : a)));
  return a < 0.625f ? near : as_f32(as_u32(far) | sign);
}

}  // namespace llmsys::cpu::LLMSYS_ISA
