// Philox-4x32-10: random words from a seed and a counter, so that any element's word can be had again at any time.
// Source: Salmon et al. 2011, doi:10.1145/2063384.2063405, section 3.3 and table 2.
//
// Element i takes word i % 4 of counter i / 4. llmsys/ops/_philox.py and _triton.py make the same words.
#pragma once

#include "simd.h"

namespace llmsys::cpu::LLMSYS_ISA {

struct Words {
  U32 low, high;  // of kLanes elements each, in their order
};

// A seed's keys of every round, in vectors: made once for many counters.
struct PhiloxKeys {
  U64 word0[10], word1[10];

  LLMSYS_INLINE explicit PhiloxKeys(uint64_t seed) {
    uint32_t key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
    for (int round = 0; round < 10; ++round, key0 += 0x9E3779B9u, key1 += 0xBB67AE85u) {
      word0[round] = splat(uint64_t(key0));
      word1[round] = splat(uint64_t(key1));
    }
  }
};

// The words of 2 * kLanes elements, the first of which is element 4 * counter.
LLMSYS_INLINE Words philox(const PhiloxKeys& keys, uint64_t counter) {
  // Lane 2j holds counter j and lane 2j + 1 the one half a vector later: interleaved at the end, they come in order.
  U64 lanes;
  for (int lane = 0; lane < kLanes / 2; ++lane) lanes[lane] = lane / 2 + (lane % 2) * (kLanes / 4);
  const U64 first = splat(counter) + lanes;
  const U64 multiplier0 = splat(uint64_t(0xD2511F53)), multiplier1 = splat(uint64_t(0xCD9E8D57));
  // The four words of the state are the low halves of these; the high halves are never looked at. Words 2 and 3 start
  // as zero, which leaves one product of the first round.
  U64 product0 = multiply_low(first, multiplier0);
  U64 c0 = first >> 32 ^ keys.word0[0], c1 = {};
  U64 c2 = product0 >> 32 ^ keys.word1[0], c3 = product0;
  for (int round = 1; round < 10; ++round) {
    product0 = multiply_low(c0, multiplier0);
    const U64 product1 = multiply_low(c2, multiplier1);
    c0 = product1 >> 32 ^ c1 ^ keys.word0[round];
    c1 = product1;
    c2 = product0 >> 32 ^ c3 ^ keys.word1[round];
    c3 = product0;
  }
  const U64 low_half = splat(uint64_t(0xffffffff));
  const U64 words01 = (c0 & low_half) | c1 << 32, words23 = (c2 & low_half) | c3 << 32;
  return {reinterpret_cast<U32>(even_lanes(words01, words23)), reinterpret_cast<U32>(odd_lanes(words01, words23))};
}

// Where the first element is not a multiple of four: cut out of two blocks.
static __attribute__((noinline)) Words philox_between(const PhiloxKeys& keys, uint64_t element) {
  const Words blocks[2] = {philox(keys, element / 4), philox(keys, element / 4 + kLanes / 2)};
  Words words;
  memcpy(&words, reinterpret_cast<const uint32_t*>(blocks) + element % 4, sizeof words);
  return words;
}

// The words of `element` and of the 2 * kLanes - 1 elements after it.
LLMSYS_INLINE Words random_words(const PhiloxKeys& keys, uint64_t element) {
  return __builtin_expect(element % 4 != 0, 0) ? philox_between(keys, element) : philox(keys, element / 4);
}

}  // namespace llmsys::cpu::LLMSYS_ISA
