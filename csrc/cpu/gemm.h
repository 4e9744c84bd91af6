// C = A B for every op that multiplies matrices, one copy per instruction set.
//
// Packed and blocked: panels of A and B are copied into the order in which a register tile reads them, widened to
// float32 on the way, so that 16-bit inputs run at the rate of float32; two matrices of bfloat16, on AVX512_BF16, as
// they are, at twice that rate. Sums are float32, always.
// Source: Goto & van de Geijn 2008, "Anatomy of High-Performance Matrix Multiplication", ACM TOMS 34(3); the loops and
// panels as in Van Zee & van de Geijn 2015, "BLIS", ACM TOMS 41(3).
//
// Each element is summed over K in an order that depends on K alone, and on whether both matrices are bfloat16: not on
// the number of threads, nor on the other rows and columns (a batch of one gives the bits of a batch of many), nor on
// the strides of A and B.
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

// Memory that `finish` reads or writes: element (row, col) is at data + row * row_bytes + col * col_bytes. It comes
// into the cache while the tile is computed, which halves the time of a short K added to a C that the caches do not
// hold.
struct Wanted {
  const char* data;
  int64_t row_bytes, col_bytes;
};

struct Gemm {
  int64_t rows, cols, depth;  // M, N, K
  Operand a, b;
  void (*finish)(const void* context, const Tile& tile);  // sees each element of C once; from any thread
  const void* context;
  Wanted wanted;
};

void gemm(const Gemm& args);

// C = A B, with finish(tile) called for the tiles of C, on the thread that has computed them.
template <class Finish>
void gemm(int64_t rows, int64_t cols, int64_t depth, const Operand& a, const Operand& b, const Finish& finish,
          const Wanted& wanted = {}) {
  auto call = [](const void* context, const Tile& tile) { (*static_cast<const Finish*>(context))(tile); };
  gemm({rows, cols, depth, a, b, call, &finish, wanted});
}

// Calls body(row, col, values, count) for each vector of a tile, of which `count` elements are C's.
template <class Body>
LLMSYS_INLINE void for_each_vector(const Tile& tile, Body body) {
  for (int r = 0; r < tile.rows; ++r) {
    const float* values = tile.values + r * kTileCols;
    if (tile.cols == kTileCols) {  // the compiler sees that all is whole
      for (int c = 0; c < kTileCols; c += kLanes) body(tile.row + r, tile.col + c, load(values + c), kLanes);
      continue;
    }
    for (int c = 0; c < tile.cols; c += kLanes)
      body(tile.row + r, tile.col + c, load(values + c), tile.cols - c < kLanes ? tile.cols - c : kLanes);
  }
}

// Writes tiles times `scale` to a row-major C, adding to what is there if `accumulate`.
template <class T>
struct Store {
  T* c;
  int64_t stride;
  bool accumulate = false;
  float scale = 1;

  Wanted wanted() const { return {reinterpret_cast<const char*>(c), stride * int64_t(sizeof(T)), sizeof(T)}; }

  LLMSYS_INLINE void operator()(const Tile& tile) const {
    for_each_vector(tile, [&](int64_t row, int64_t col, F32 value, int count) {
      T* p = c + row * stride + col;
      store_some(p, accumulate ? multiply_add(value, splat(scale), load_some(p, count)) : value * scale, count);
    });
  }
};

}  // namespace llmsys::cpu::LLMSYS_ISA
