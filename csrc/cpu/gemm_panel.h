// The innermost pieces of gemm.cpp: packing a panel of an operand, and multiplying two panels in registers.
#pragma once

#include "gemm.h"

namespace llmsys::cpu::LLMSYS_ISA {

// ---- packing: panel[k * kWidth + r] = element (r, k) in float32, zero for rows from `rows` on ----

// Exchanges rows and columns of kLanes vectors.
LLMSYS_INLINE void transpose(F32 (&v)[kLanes]) {
  typedef int32_t Index __attribute__((vector_size(LLMSYS_VECTOR_BYTES)));
  // Step s exchanges bit s of the row number with bit s of the lane number.
  for (int step = 1; step < kLanes; step *= 2) {
    Index low, high;
    for (int i = 0; i < kLanes; ++i) {
      low[i] = i & step ? kLanes + (i ^ step) : i;
      high[i] = i & step ? kLanes + i : i ^ step;
    }
    for (int i = 0; i < kLanes; ++i) {
      if (i & step) continue;
      const F32 a = v[i], b = v[i + step];
      v[i] = __builtin_shuffle(a, b, low);
      v[i + step] = __builtin_shuffle(a, b, high);
    }
  }
}

// Rows whose elements lie side by side along k: blocks of kLanes x kLanes are transposed in registers.
template <int kWidth, class T>
void pack_along_k(const T* source, int64_t row_stride, int rows, int64_t depth, float* panel) {
  constexpr int kGroups = (kWidth + kLanes - 1) / kLanes;
  int64_t k = 0;
  for (; k + kLanes <= depth; k += kLanes) {
    // A vector that sticks out of the panel's width is stored before the one that belongs there: groups from the last,
    // k upwards. What sticks out at the end is overwritten by the next panel, or falls into kPanelSlack.
    for (int group = kGroups - 1; group >= 0; --group) {
      F32 v[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        const int row = group * kLanes + i;
        v[i] = row < rows && row < kWidth ? load(source + row * row_stride + k) : F32{};
      }
      transpose(v);
      for (int i = 0; i < kLanes; ++i) store(panel + (k + i) * kWidth + group * kLanes, v[i]);
    }
  }
  for (; k < depth; ++k)
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

// tile = panel of A times panel of B, added to what the tile holds if `add`: partial sums are summed apart.
template <int kRows>
void multiply(int64_t depth, const float* a, const float* b, float* tile, bool add) {
  F32 sum[kRows][kTileVectors];
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kTileVectors; ++v) sum[r][v] = F32{};  // `= {}` would go through memory
#pragma GCC unroll 4
  for (int64_t k = 0; k < depth; ++k) {
    F32 right[kTileVectors];
    for (int v = 0; v < kTileVectors; ++v) right[v] = load(b + v * kLanes);
    for (int r = 0; r < kRows; ++r) {
      const F32 left = splat(a[r]);
      for (int v = 0; v < kTileVectors; ++v) sum[r][v] = left * right[v] + sum[r][v];
    }
    a += kTileRows;
    b += kTileCols;
  }
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kTileVectors; ++v) {
      float* p = tile + r * kTileCols + v * kLanes;
      store(p, add ? load(p) + sum[r][v] : sum[r][v]);
    }
}

}  // namespace llmsys::cpu::LLMSYS_ISA
