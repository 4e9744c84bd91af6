// Blocks: two vectors of consecutive elements, in the order that costs least to load and store.
#pragma once

#include "lanes.h"
#include "loads.h"

namespace llmsys::cpu::LLMSYS_ISA {

struct Block {
  F32 first, second;
};

// halves: the first kLanes elements, then the others. alternate: the even elements, then the odd ones, which is how
// bfloat16 widens and narrows by shifts and masks alone.
enum class Order { halves, alternate };

// The order for a loop whose outputs and largest inputs are of T.
template <class T>
constexpr Order order_of = __is_same(T, bfloat16) ? Order::alternate : Order::halves;

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

}  // namespace llmsys::cpu::LLMSYS_ISA
