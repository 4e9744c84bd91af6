// Philox-4x32-10 on GPUs: the words of csrc/cpu/philox.h.
// Source: Salmon et al. 2011, doi:10.1145/2063384.2063405, section 3.3 and table 2.
#pragma once

#include "device.cuh"

namespace llmsys::cuda {

// The words of the four elements from 4 * counter on.
__device__ inline uint4 philox(uint64_t seed, uint64_t counter) {
  uint32_t key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
  uint4 words{uint32_t(counter), uint32_t(counter >> 32), 0, 0};
#pragma unroll
  for (int round = 0; round < 10; ++round, key0 += 0x9E3779B9u, key1 += 0xBB67AE85u) {
    const uint64_t product0 = uint64_t(words.x) * 0xD2511F53u, product1 = uint64_t(words.z) * 0xCD9E8D57u;
    words = {uint32_t(product1 >> 32) ^ words.y ^ key0, uint32_t(product1), uint32_t(product0 >> 32) ^ words.w ^ key1,
             uint32_t(product0)};
  }
  return words;
}

}  // namespace llmsys::cuda
