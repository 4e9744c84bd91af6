// C = A B for every op that multiplies matrices, one copy per instruction set.
//
// Packed and blocked: panels of A and B are copied into the order in which a register tile reads them, widened to
// float32 on the way, so that 16-bit inputs run at the rate of float32. Sums are float32, always.
// Source: Goto & van de Geijn 2008, "Anatomy of High-Performance Matrix Multiplication", ACM TOMS 34(3); the loops and
// panels as in Van Zee & van de Geijn 2015, "BLIS", ACM TOMS 41(3).
//
// Each element is summed over K in an order that depends on K alone: not on the number of threads, nor on the other
// rows and columns (a batch of one gives the bits of a batch of many), nor on the strides and types of A and B.
#pragma once

#include <cstdint>

#include "simd.h"

namespace llmsys::cpu::LLMSYS_ISA {

// The register tile: rows x columns of C whose sums stay in registers while K runs.
#if LLMSYS_AVX512
constexpr int kTileRows = 14;  // 28 accumulators of 32 registers, 2 for B, 2 for elements of A
#else
constexpr int kTileRows = 6;  // 12 accumulators of 16 registers, 2 for B, 2 for elements of A
#endif
constexpr int kTileVectors = 2;
constexpr int kTileCols = kTileVectors * kLanes;

// One input. `row` runs over the rows of C in A and over its columns in B; `k` runs over what is summed. Fast where
// one of the strides (in elements) is 1. Any alignment.
struct Operand {
  const void* data;
  DType dtype;
  int64_t row_stride, k_stride;
};

// Finished elements of C, still in the first-level cache: values[r * kTileCols + c] for r < rows, c < cols is the
// element (row + r, col + c). The other columns are readable, up to kTileCols.
struct Tile {
  const float* values;
  int64_t row, col;
  int rows, cols;
};

struct Gemm {
  int64_t rows, cols, depth;  // M, N, K
  Operand a, b;
  void (*finish)(const void* context, const Tile& tile);  // sees each element of C once; from any thread
  const void* context;
};

void gemm(const Gemm& args);

// C = A B, with finish(tile) called for the tiles of C, on the thread that has computed them.
template <class Finish>
void gemm(int64_t rows, int64_t cols, int64_t depth, const Operand& a, const Operand& b, const Finish& finish) {
  auto call = [](const void* context, const Tile& tile) { (*static_cast<const Finish*>(context))(tile); };
  gemm({rows, cols, depth, a, b, call, &finish});
}

// Calls body(row, col, values, offset, count) for each vector of a tile: `offset` counts from the tile's first column.
template <class Body>
LLMSYS_INLINE void for_each_vector(const Tile& tile, Body body) {
  for (int r = 0; r < tile.rows; ++r)
    for (int c = 0; c < tile.cols; c += kLanes)
      body(tile.row + r, tile.col + c, load(tile.values + r * kTileCols + c),
           tile.cols - c < kLanes ? tile.cols - c : kLanes);
}

// Writes tiles to a row-major C, adding to what is there if `accumulate`.
template <class T>
struct Store {
  T* c;
  int64_t stride;
  bool accumulate = false;

  LLMSYS_INLINE void operator()(const Tile& tile) const {
    for_each_vector(tile, [&](int64_t row, int64_t col, F32 value, int count) {
      T* p = c + row * stride + col;
      store_some(p, accumulate ? value + load_some(p, count) : value, count);
    });
  }
};

}  // namespace llmsys::cpu::LLMSYS_ISA
