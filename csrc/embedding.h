// Embedding: row ids[n] of a table for each n, and the sum of the gradients that arrive at each row.
// Rows are contiguous inside; `*_stride` is the distance between rows, in elements. Outputs are contiguous.
#pragma once

#include <cstdint>

#include "dtype.h"

namespace llmsys {

struct EmbeddingForward {
  const int64_t* ids;  // (count), each in [0, rows)
  const void* weight;  // (rows, dim)
  void* y;             // (count, dim)
  int64_t count, rows, dim;
  int64_t weight_stride;
  DType dtype;
};

struct EmbeddingBackward {
  const int64_t* ids;  // (count), each in [0, rows)
  const void* dy;      // (count, dim)
  void* dweight;       // (rows, dim)
  int64_t* starts;     // (rows + 1), scratch: where each row's positions start in `order`
  int64_t* order;      // (count), scratch: the positions of ids, by id, then by position
  int64_t count, rows, dim;
  int64_t dy_stride;
  int64_t padding;  // this row's gradient is zero; -1 for none
  DType dtype;
};

// The first position whose id is not in [0, rows); -1 where there is none.
inline int64_t first_out_of_range(const int64_t* ids, int64_t count, int64_t rows) {
  uint64_t largest = 0;  // as unsigned numbers, negative ones are large
  for (int64_t i = 0; i < count; ++i) largest = uint64_t(ids[i]) > largest ? uint64_t(ids[i]) : largest;
  if (count == 0 || largest < uint64_t(rows)) return -1;
  int64_t i = 0;
  while (uint64_t(ids[i]) < uint64_t(rows)) ++i;
  return i;
}

namespace cpu {
void embedding_forward(const EmbeddingForward& args);
void embedding_backward(const EmbeddingBackward& args);
}  // namespace cpu

}  // namespace llmsys
