// Stands in for the PTX of csrc/cuda/device.cuh: asynchronous copies, matrices of shared memory, tensor cores.
//
// A copy is made when its thread waits for it, and not before: until then its bytes may be neither read nor written.
// Fragments lie in the lanes as PTX has them (PTX ISA 9.0, sections 9.7.14.5.8 and 9.7.14.5.15).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>

#include "cuda_runtime.h"

namespace simt {

void copy_async(SharedMemory& memory, int64_t offset, const void* from, size_t bytes, bool there);
void commit_copies();
void wait_for_copies(const Site& site, int newest);

// Each lane brings a row of 8 two-byte elements: rows 8i to 8i + 7 are matrix i, of which it is given a pair.
void exchange_matrices(const Site& site, const uint16_t (&row)[8], bool transposed, uint32_t (&pairs)[4]);

void multiply_matrices(const Site& site, bool halves, float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);

}  // namespace simt

namespace llmsys::cuda {

using simt::Shared;

template <class T>
void copy_async(Shared<T> to, const T* from, bool there) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 16);
  simt::copy_async(to.memory(), to.offset(), from, sizeof(T), there);
}

inline void commit_copies() { simt::commit_copies(); }

template <int kNewest>
void wait_for_copies(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  simt::wait_for_copies({"wait_for_copies", file, line}, kNewest);
}

template <bool kTransposed, class T>
void ldmatrix(uint32_t (&pairs)[4], Shared<T> row, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  static_assert(sizeof(T) == 16);
  uint16_t elements[8];
  row.memory().read(row.offset(), elements, sizeof elements);
  simt::exchange_matrices({"ldmatrix", file, line}, elements, kTransposed, pairs);
}

template <class T>
void mma(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const char* file = __builtin_FILE(),
         int line = __builtin_LINE()) {
  simt::multiply_matrices({"mma", file, line}, std::is_same_v<T, __half>, sums, a, b);
}

inline float exp2_flushed(float x) { return x < -126.0f ? 0.0f : std::exp2(x); }

}  // namespace llmsys::cuda
