// The only threads of the library: the OpenMP pool that torch already runs, with its number of threads.
#pragma once

#include <atomic>
#include <cstdint>

#include "../numbers.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace llmsys::cpu::LLMSYS_ISA {

// Calls body(begin, end) over [0, size), split evenly and in order over as many threads as have `grain` items each.
template <class Body>
void parallel_for(int64_t size, int64_t grain, Body body) {
#if defined(_OPENMP)
  int64_t threads = omp_in_parallel() ? 1 : omp_get_max_threads();
  if (threads > 1 && grain > 0) threads = smaller(threads, ceil_div(size, grain));
  if (threads > 1) {
#pragma omp parallel num_threads(int(threads))
    {
      int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();
      body(size * thread / team, size * (thread + 1) / team);
    }
    return;
  }
#endif
  if (size > 0) body(int64_t(0), size);
}

// Calls body(i) for each i of [0, size), the next one on whichever of at most `most` threads is free: for items of
// unequal cost, the longest first.
template <class Body>
void parallel_each(int64_t size, int64_t most, Body body) {
#if defined(_OPENMP)
  std::atomic<int64_t> next{0};
  int64_t threads = omp_in_parallel() ? 1 : omp_get_max_threads();
  threads = smaller(smaller(most, size), threads);
  if (threads > 1) {
#pragma omp parallel num_threads(int(threads))
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < size;) body(i);
    return;
  }
#endif
  for (int64_t i = 0; i < size; ++i) body(i);
}

// Items of `item_bytes` that make a thread's while: waking one costs a few microseconds, about 32 KiB of traffic.
inline int64_t grain_of(int64_t item_bytes) {
  int64_t grain = (int64_t(32) << 10) / (item_bytes > 0 ? item_bytes : 1);
  return larger(grain, 1);
}

}  // namespace llmsys::cpu::LLMSYS_ISA
