// One vector type, as wide as the instruction set this file is compiled for; the only intrinsics of the library.
// Long because each operation stands here once per instruction set, side by side.
//
// Each kernel file is compiled once per instruction set, with LLMSYS_ISA naming the namespace (baseline, avx2, avx512,
// avx512_bf16). Everything here lives inside that namespace, so that no symbol compiled for a wide machine can stand in
// for a baseline one at link time. Arithmetic (+ - * /, comparisons, selection) is the compiler's vector extension,
// each operation rounded; multiply_add is the one that fuses two, so that no bit depends on what a compiler likes to
// fuse.
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

#if defined(__AVX512BF16__)
// Whether one is a subnormal number, which the instructions for bfloat16 take for zero; all others round as elsewhere.
LLMSYS_INLINE bool any_subnormal(F32 a, F32 b) {
  return !_kortestz_mask16_u8(_mm512_fpclass_ps_mask(a, 0x20), _mm512_fpclass_ps_mask(b, 0x20));
}
#endif

template <bool kStream, class Half>
LLMSYS_INLINE void store_pair(Half* p, F32 low, F32 high) {
#if defined(__AVX512BF16__)
  if constexpr (__is_same(Half, bfloat16))
    if (__builtin_expect(!any_subnormal(low, high), 1))
      return store_vector<kStream>(p, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low)));
#endif
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
#endif

template <Order kOrder, bool kStream, class T>
LLMSYS_INLINE void store_block(T* p, Block block) {
  if constexpr (kOrder == Order::alternate && __is_same(T, bfloat16)) {
#if defined(__AVX512BF16__)
    if (__builtin_expect(!any_subnormal(block.first, block.second), 1)) {
      const __m512i halves = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(block.second, block.first));
      return store_vector<kStream>(p, _mm512_permutexvar_epi16(reinterpret_cast<__m512i>(interleaved()), halves));
    }
#endif
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

// ---- loops and sums ----

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

// Calls body(offset) for whole pairs of vectors, then tail(offset, count) for what is left, a vector at most at a time.
template <class Body, class Tail>
LLMSYS_INLINE void for_each_pair(int64_t size, Body body, Tail tail) {
  int64_t offset = 0;
  for (; offset + 2 * kLanes <= size; offset += 2 * kLanes) body(offset);
  for (; offset < size; offset += kLanes) tail(offset, size - offset < kLanes ? int(size - offset) : kLanes);
}

// The first `count` lanes of value, and `otherwise` in the others.
LLMSYS_INLINE F32 first_lanes(int count, F32 value, float otherwise) {
  I32 index;
  for (int i = 0; i < kLanes; ++i) index[i] = i;
  return select(index < count, value, splat(otherwise));
}

// The largest element; NaN is passed over where another is none. -infinity of no elements.
template <class T>
float max_over(const T* x, int64_t size) {
  constexpr float kLowest = -__builtin_inff();
  F32 highest = splat(kLowest);
  for_each_pair(
      size,
      [&](int64_t d) {
        Block block = load_block<order_of<T>>(x + d);
        highest = max(block.second, max(block.first, highest));
      },
      [&](int64_t d, int count) { highest = max(first_lanes(count, load(x + d, count), kLowest), highest); });
  return max_lane(highest);
}

// The sum over [0, size): add(offset, sum) is a block of it added to `sum`, tail(offset, count) a vector of it whose
// other lanes are zero. Summed in short runs, then over the runs, then over the lanes in double: the error grows with
// the logarithm of size in practice, and the order, so the bits, depends on size and the vector's width alone.
template <class Add, class Tail>
LLMSYS_INLINE double sum_over(int64_t size, Add add, Tail tail) {
  constexpr int kBlocks = 4;  // sums side by side, as an addition takes several cycles
  constexpr int64_t kBlock = 2 * kLanes, kStep = kBlocks * kBlock, kRun = 8 * kStep;
  F32 total = {};
  int64_t offset = 0;
  for (const int64_t whole = size - size % kStep; offset < whole;) {
    const int64_t end = whole - offset < kRun ? whole : offset + kRun;
    Block parts[kBlocks] = {};
    for (; offset < end; offset += kStep)
      for (int i = 0; i < kBlocks; ++i) parts[i] = add(offset + i * kBlock, parts[i]);
    for (int i = 0; i < kBlocks; ++i) total = total + (parts[i].first + parts[i].second);
  }
  Block rest = {};
  for (; offset + kBlock <= size; offset += kBlock) rest = add(offset, rest);
  total = total + (rest.first + rest.second);
  for (; offset < size; offset += kLanes) {
    total = total + tail(offset, size - offset < kLanes ? int(size - offset) : kLanes);
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

}  // namespace llmsys::cpu::LLMSYS_ISA
