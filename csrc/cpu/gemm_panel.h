// The innermost pieces of gemm.cpp: packing a panel of an operand, and multiplying two panels in registers.
#pragma once

#include <utility>

#include "gemm.h"

namespace llmsys::cpu::LLMSYS_ISA {

// ---- packing: panel[k * kWidth + r] = element (r, k) in float32, zero for rows from `rows` on ----

// Which lane of (a, b) goes to lane i: the instructions that machines have, with constants for the compiler to see.
constexpr int low_ones(int i) { return (i % 2) * kLanes + i / 4 * 4 + i % 4 / 2; }  // a0 b0 a1 b1 of each four lanes
constexpr int high_ones(int i) { return low_ones(i) + 2; }                          // a2 b2 a3 b3
constexpr int low_twos(int i) { return i % 4 < 2 ? i : kLanes + i - 2; }            // a0 a1 b0 b1
constexpr int high_twos(int i) { return i % 4 < 2 ? i + 2 : kLanes + i; }           // a2 a3 b2 b3
template <int kStep>
constexpr int low_runs(int i) {  // the even runs of kStep lanes, of a and b by turns
  return i & kStep ? kLanes + (i ^ kStep) : i;
}
template <int kStep>
constexpr int high_runs(int i) {  // the odd ones
  return i & kStep ? kLanes + i : i ^ kStep;
}

template <int (*kLane)(int), int... i>
LLMSYS_INLINE F32 shuffle(F32 a, F32 b, std::integer_sequence<int, i...>) {
  return __builtin_shufflevector(a, b, kLane(i)...);
}
template <int (*kLane)(int)>
LLMSYS_INLINE F32 shuffle(F32 a, F32 b) {
  return shuffle<kLane>(a, b, std::make_integer_sequence<int, kLanes>());
}

// Exchanges rows and columns in blocks of kStep x kStep.
template <int kStep>
LLMSYS_INLINE void transpose_runs(F32 (&v)[kLanes]) {
  if constexpr (kStep < kLanes) {
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) {
      if (i & kStep) continue;
      const F32 a = v[i], b = v[i + kStep];
      v[i] = shuffle<low_runs<kStep>>(a, b);
      v[i + kStep] = shuffle<high_runs<kStep>>(a, b);
    }
    transpose_runs<2 * kStep>(v);
  }
}

// Exchanges rows and columns of kLanes vectors.
LLMSYS_INLINE void transpose(F32 (&v)[kLanes]) {
#pragma GCC unroll 4
  for (int i = 0; i < kLanes; i += 4) {
    const F32 low01 = shuffle<low_ones>(v[i], v[i + 1]), high01 = shuffle<high_ones>(v[i], v[i + 1]);
    const F32 low23 = shuffle<low_ones>(v[i + 2], v[i + 3]), high23 = shuffle<high_ones>(v[i + 2], v[i + 3]);
    v[i] = shuffle<low_twos>(low01, low23);
    v[i + 1] = shuffle<high_twos>(low01, low23);
    v[i + 2] = shuffle<low_twos>(high01, high23);
    v[i + 3] = shuffle<high_twos>(high01, high23);
  }
  transpose_runs<4>(v);
}

// Rows whose elements lie side by side along k: blocks of kLanes x kLanes are transposed in registers.
template <int kWidth, class T>
void pack_along_k(const T* source, int64_t row_stride, int rows, int64_t depth, float* panel) {
  constexpr int kGroups = (kWidth + kLanes - 1) / kLanes;
  // A run of k reads whole cache lines of a group of rows before the next group's: rows that are a power of two apart
  // fall into one set of the cache, which holds few lines.
  constexpr int kRun = 64 / sizeof(T) > kLanes ? 64 / sizeof(T) : kLanes;
  const int64_t whole = depth / kLanes * kLanes;
  for (int64_t start = 0; start < whole; start += kRun) {
    const int64_t end = start + kRun < whole ? start + kRun : whole;
    // A vector that sticks out of the panel's width is stored before the one that belongs there: groups from the last,
    // k upwards. What sticks out at the end is overwritten by the next panel, or falls into kPanelSlack.
    for (int group = kGroups - 1; group >= 0; --group)
      for (int64_t k = start; k < end; k += kLanes) {
        F32 v[kLanes];
        for (int i = 0; i < kLanes; ++i) {
          const int row = group * kLanes + i;
          v[i] = row < rows && row < kWidth ? load(source + row * row_stride + k) : F32{};
        }
        transpose(v);
        for (int i = 0; i < kLanes; ++i) store(panel + (k + i) * kWidth + group * kLanes, v[i]);
      }
  }
  for (int64_t k = whole; k < depth; ++k)
    for (int row = 0; row < kWidth; ++row)
      panel[k * kWidth + row] = row < rows ? to_float(source[row * row_stride + k]) : 0.0f;
}

// Rows that lie side by side: whole vectors are copied, where `readable` elements from each k on are the operand's.
template <int kWidth, class T>
void pack_along_rows(const T* source, int64_t k_stride, int rows, int64_t readable, int64_t depth, float* panel) {
  constexpr int kGroups = (kWidth + kLanes - 1) / kLanes;
  if (rows == kWidth && readable >= kGroups * kLanes) {
    for (int64_t k = 0; k < depth; ++k)
      for (int group = 0; group < kGroups; ++group)
        store(panel + k * kWidth + group * kLanes, load(source + k * k_stride + group * kLanes));
    return;
  }
  for (int64_t k = 0; k < depth; ++k)
    for (int row = 0; row < kWidth; ++row)
      panel[k * kWidth + row] = row < rows ? to_float(source[k * k_stride + row]) : 0.0f;
}

template <int kWidth, class T>
void pack_strided(const T* source, int64_t row_stride, int64_t k_stride, int rows, int64_t depth, float* panel) {
  for (int64_t k = 0; k < depth; ++k)
    for (int row = 0; row < kWidth; ++row)
      panel[k * kWidth + row] = row < rows ? to_float(source[row * row_stride + k * k_stride]) : 0.0f;
}

// Floats that packing may write past a panel's end.
constexpr int kPanelSlack = kLanes;

// Packs rows [row, row + kWidth) of `operand`, of which there are `num_rows` in all, over [k, k + depth).
template <int kWidth>
void pack(const Operand& operand, int64_t num_rows, int64_t row, int64_t k, int64_t depth, float* panel) {
  with_type(operand.dtype, [&](auto element) {
    using T = decltype(element);
    const T* source = static_cast<const T*>(operand.data) + row * operand.row_stride + k * operand.k_stride;
    const int64_t readable = num_rows - row;
    const int rows = readable < kWidth ? int(readable) : kWidth;
    if (operand.k_stride == 1)
      pack_along_k<kWidth>(source, operand.row_stride, rows, depth, panel);
    else if (operand.row_stride == 1)
      pack_along_rows<kWidth>(source, operand.k_stride, rows, readable, depth, panel);
    else
      pack_strided<kWidth>(source, operand.row_stride, operand.k_stride, rows, depth, panel);
  });
}

// ---- multiplying ----

// One k: a column of A times a row of B.
template <int kRows>
LLMSYS_INLINE void multiply_once(const float* a, const float* b, F32 (&sum)[kRows][kTileVectors]) {
  F32 right[kTileVectors];
  for (int v = 0; v < kTileVectors; ++v) right[v] = load(b + v * kLanes);
  for (int r = 0; r < kRows; ++r) {
    const F32 left = splat(a[r]);
    for (int v = 0; v < kTileVectors; ++v) sum[r][v] = left * right[v] + sum[r][v];
  }
}

template <int kRows>
LLMSYS_INLINE void clear(F32 (&sum)[kRows][kTileVectors]) {
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kTileVectors; ++v) sum[r][v] = F32{};  // `= {}` would go through memory
}

template <int kRows>
LLMSYS_INLINE void put(const F32 (&sum)[kRows][kTileVectors], float* tile, bool add) {
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kTileVectors; ++v) {
      float* p = tile + r * kTileCols + v * kLanes;
      store(p, add ? load(p) + sum[r][v] : sum[r][v]);
    }
}

// tile = panel of A times panel of B, added to what the tile holds if `add`. Sums leave the registers after each `run`
// of k, a multiple of 8: the rounding errors of short runs, and of few of them, add up to less.
template <int kRows>
void multiply(int64_t depth, int64_t run, const float* a, const float* b, float* tile, bool add) {
  F32 sum[kRows][kTileVectors];
  for (; depth >= run; depth -= run) {
    clear(sum);
    for (int64_t i = 0; i < run; i += 8) {
#pragma GCC unroll 8
      for (int k = 0; k < 8; ++k) multiply_once(a + k * kTileRows, b + k * kTileCols, sum);
      a += 8 * kTileRows;
      b += 8 * kTileCols;
    }
    put(sum, tile, add);
    add = true;
  }
  if (depth == 0 && add) return;
  clear(sum);
  for (; depth > 0; --depth, a += kTileRows, b += kTileCols) multiply_once(a, b, sum);
  put(sum, tile, add);
}

}  // namespace llmsys::cpu::LLMSYS_ISA
