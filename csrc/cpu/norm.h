// What the norms of rows share: the addition before, the sums of weight gradients after.
#pragma once

#include "parallel.h"
#include "simd.h"

namespace llmsys::cpu::LLMSYS_ISA {

// f of each half of some blocks.
template <class F, class... Blocks>
LLMSYS_INLINE Block each_half(F f, const Blocks&... blocks) {
  return {f(blocks.first...), f(blocks.second...)};
}

// A row's sum must be known before the row is scaled, so memory would idle meanwhile: the scaling of one row fetches
// the next, where two rows fit a core's private cache.
template <class T>
bool prefetchable(int64_t dim) {
  return dim * int64_t(sizeof(T)) <= (64 << 10);
}

// s = x + residual, rounded; read back as it was stored.
template <class T>
void add_row(const T* x, const T* residual, T* sum, int64_t dim) {
  constexpr Order kOrder = order_of<T>;
  for_each_pair(
      dim,
      [&](int64_t d) {
        Block a = load_block<kOrder>(x + d), b = load_block<kOrder>(residual + d);
        store_block<kOrder, false>(sum + d, {a.first + b.first, a.second + b.second});
      },
      [&](int64_t d, int count) { store(sum + d, load(x + d, count) + load(residual + d, count), count); });
}

// A weight's gradient: the sum over the chunks of `partial` (chunks, dim), whose whole blocks are in the order of T's.
template <class T, class W>
void sum_partials(const float* partial, int64_t chunks, int64_t dim, W* dweight) {
  constexpr int64_t kBlock = 2 * kLanes;
  const int64_t blocks = (dim + kBlock - 1) / kBlock;
  parallel_for(blocks, grain_of(chunks * kBlock * sizeof(float)), [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kBlock, size = end * kBlock < dim ? end * kBlock - first : dim - first;
    for_each_pair(
        size,
        [&](int64_t d) {
          Block sum = {};
          for (int64_t chunk = 0; chunk < chunks; ++chunk) {
            const float* at = partial + chunk * dim + first + d;
            sum = {sum.first + load(at), sum.second + load(at + kLanes)};
          }
          store_block<order_of<T>, false>(dweight + first + d, sum);
        },
        [&](int64_t d, int count) {
          F32 sum = {};
          for (int64_t chunk = 0; chunk < chunks; ++chunk) sum = sum + load(partial + chunk * dim + first + d, count);
          store(dweight + first + d, sum, count);
        });
  });
}

// Calls visit(T{}, W{}) with the C++ types of (dtype, weight_dtype).
template <class Visit>
void with_types(DType dtype, DType weight_dtype, Visit visit) {
  with_type(dtype, [&](auto x) { weight_dtype == DType::float32 ? visit(x, float{}) : visit(x, x); });
}

}  // namespace llmsys::cpu::LLMSYS_ISA
