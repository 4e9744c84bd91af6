// Loops over an array, and its largest element and sum.
#pragma once

#include "../../numbers.h"
#include "blocks.h"

namespace llmsys::cpu::LLMSYS_ISA {

// Calls body(offset) for whole pairs of vectors, then tail(offset, count) for what is left, a vector at most at a time.
template <class Body, class Tail>
LLMSYS_INLINE void for_each_pair(int64_t size, Body body, Tail tail) {
  int64_t offset = 0;
  for (; offset + 2 * kLanes <= size; offset += 2 * kLanes) body(offset);
  for (; offset < size; offset += kLanes) tail(offset, size - offset < kLanes ? int(size - offset) : kLanes);
}

// The largest element; NaN is passed over where another is none. -infinity of no elements.
template <class T>
float max_over(const T* x, int64_t size) {
  F32 highest = splat(-kInfinity);
  for_each_pair(
      size,
      [&](int64_t d) {
        Block block = load_block<order_of<T>>(x + d);
        highest = max(block.second, max(block.first, highest));
      },
      [&](int64_t d, int count) { highest = max(first_lanes(count, load(x + d, count), -kInfinity), highest); });
  return max_lane(highest);
}

// The sum over [0, size): add(offset, sum) is a block of it added to `sum`, tail(offset, count) a vector of it whose
// other lanes are zero. Summed in short runs, then over the runs, then over the lanes in double: the error grows with
// the logarithm of size in practice, and the order, so the bits, depends on size and the vector's width alone.
template <class Add, class Tail>
LLMSYS_INLINE double sum_over(int64_t size, Add add, Tail tail) {
  constexpr int kBlocks = 4;  // sums side by side, as an addition takes several cycles
  constexpr int64_t kBlock = 2 * kLanes, kStep = kBlocks * kBlock, kRun = 8 * kStep;
  F32 total = {};
  int64_t offset = 0;
  for (const int64_t whole = size - size % kStep; offset < whole;) {
    const int64_t end = whole - offset < kRun ? whole : offset + kRun;
    Block parts[kBlocks] = {};
    for (; offset < end; offset += kStep)
      for (int i = 0; i < kBlocks; ++i) parts[i] = add(offset + i * kBlock, parts[i]);
    for (int i = 0; i < kBlocks; ++i) total = total + (parts[i].first + parts[i].second);
  }
  Block rest = {};
  for (; offset + kBlock <= size; offset += kBlock) rest = add(offset, rest);
  total = total + (rest.first + rest.second);
  for (; offset < size; offset += kLanes) {
    total = total + tail(offset, size - offset < kLanes ? int(size - offset) : kLanes);
  }
  double sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += total[i];
  return sum;
}

}  // namespace llmsys::cpu::LLMSYS_ISA
