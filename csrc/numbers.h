// What csrc/cpu and csrc/cuda do with single numbers.
#pragma once

#include <cstdint>

// Functions of both. Always inlined: one that an object for a wide instruction set exported could stand in for the
// baseline's at link time, as those of <algorithm> could.
#if defined(__CUDACC__)
#define LLMSYS_ANYWHERE __host__ __device__ inline __attribute__((always_inline))
#else
#define LLMSYS_ANYWHERE inline __attribute__((always_inline))
#endif

namespace llmsys {

constexpr float kInfinity = __builtin_huge_valf();

LLMSYS_ANYWHERE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
LLMSYS_ANYWHERE constexpr int64_t round_up(int64_t a, int64_t unit) { return ceil_div(a, unit) * unit; }
LLMSYS_ANYWHERE constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
LLMSYS_ANYWHERE constexpr int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

}  // namespace llmsys
