// Everything that is CUDA's own: launches, shared memory, asynchronous copies, tensor cores, reductions, vector loads
// and stores, element types.
//
// Compiled by nvcc, this is CUDA. Compiled by g++ with tests/simt first on the include path, the <cuda_*.h> below are
// the simulator's, and the same kernels run on the CPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "../dtype.h"
#include "../numbers.h"

// Shared memory is declared with these two alone, so that the simulator sees each access to it.
#ifndef LLMSYS_SHARED
#define LLMSYS_SHARED(T, name, size) __shared__ T name[size]
#define LLMSYS_DYNAMIC_SHARED(T, name)                            \
  extern __shared__ __align__(16) unsigned char dynamic_shared[]; \
  T* name = reinterpret_cast<T*>(dynamic_shared)

// PTX that CUDA C++ has no functions for; tests/simt/ptx.h has the simulator's.
namespace llmsys::cuda {

// A pointer to shared memory.
template <class T>
using Shared = T*;

template <class T>
__device__ unsigned address_of(Shared<T> pointer) {
  return unsigned(__cvta_generic_to_shared(pointer));
}

// Starts to copy an element of 4 or 16 bytes; zeros, if it is not `there`, and `from` is then not read.
template <class T>
__device__ void copy_async(Shared<T> to, const T* from, bool there) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 16);
  const int bytes = there ? int(sizeof(T)) : 0;
  if constexpr (sizeof(T) == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address_of(to)), "l"(from), "r"(bytes)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(address_of(to)), "l"(from), "r"(bytes)
                 : "memory");
}

// The copies that this thread has started since the last commit are a group.
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until all of this thread's groups but the kNewest newest ones have come; a barrier tells other threads.
template <int kNewest>
__device__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kNewest) : "memory");
}

// Four 8 x 8 matrices of two-byte elements: lane 8i + j points to row j of matrix i, of 16 bytes, and is given of each
// matrix the elements 2l % 8 and 2l % 8 + 1 of row l / 4, l its number; with kTransposed, of the transposed matrix.
template <bool kTransposed, class T>
__device__ void ldmatrix(uint32_t (&pairs)[4], Shared<T> row) {
  static_assert(sizeof(T) == 16);
  if constexpr (kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(pairs[0]), "=r"(pairs[1]), "=r"(pairs[2]), "=r"(pairs[3])
                 : "r"(address_of(row))
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(pairs[0]), "=r"(pairs[1]), "=r"(pairs[2]), "=r"(pairs[3])
                 : "r"(address_of(row))
                 : "memory");
}

// sums += A B: 16 x 16 times 16 x 8, of bfloat16 or half, in the fragments of mma.m16n8k16.
template <class T>
__device__ void mma(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, __half>)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// 2^x to the last bits, and 0 where that is below the smallest normal number.
__device__ inline float exp2_flushed(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

}  // namespace llmsys::cuda
#endif

namespace llmsys::cuda {

// ---- host: launches ----

constexpr int kWarp = 32;
constexpr int kVectorBytes = 16;  // the widest access a thread can make
constexpr int64_t kMaxBlocks = 0x7fffffff;

struct Grid {
  dim3 blocks, threads;
  size_t shared_bytes = 0;
};

// Starts kernel(arguments...) on `stream`. Faults of a kernel that runs show at a later call, as CUDA has it.
template <class... Parameters, class... Arguments>
void launch(const char* name, const Grid& grid, void* stream, void (*kernel)(Parameters...),
            const Arguments&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid.blocks;
  config.blockDim = grid.threads;
  config.dynamicSmemBytes = grid.shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  cudaError_t error = cudaSuccess;
  if (grid.shared_bytes > 0)  // without asking, it may have 48 KiB less what the kernel declares
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(grid.shared_bytes));
  if (error == cudaSuccess) error = cudaLaunchKernelEx(&config, kernel, arguments...);
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("llmsys.cuda.") + name + ": " + cudaGetErrorString(error));
}

// Whether all these may be read and written kVectorBytes at a time. A null pointer may.
template <class... Pointers>
bool aligned(Pointers... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % kVectorBytes == 0) && ...);
}

// Calls visit(T{}) with the C++ type of `dtype`.
template <class Visit>
void with_type(DType dtype, Visit visit) {
  switch (dtype) {
    case DType::float32:
      return visit(float{});
    case DType::bfloat16:
      return visit(__nv_bfloat16{});
    case DType::float16:
      return visit(__half{});
  }
}

// ---- element types: arithmetic is in float32, conversions round to nearest even ----

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ inline float to_float(__half value) { return __half2float(value); }

template <class T>
__device__ T from_float(float value);
template <>
__device__ inline float from_float(float value) {
  return value;
}
template <>
__device__ inline __nv_bfloat16 from_float(float value) {
  return __float2bfloat16_rn(value);
}
template <>
__device__ inline __half from_float(float value) {
  return __float2half_rn(value);
}

// Two neighbours in one word, the first in its low half.
template <class T>
__device__ uint32_t pair_of(float first, float second) {
  uint32_t pair;
  if constexpr (std::is_same_v<T, __half>) {
    const __half2 halves = __floats2half2_rn(first, second);
    memcpy(&pair, &halves, sizeof pair);
  } else {
    const __nv_bfloat162 halves = __floats2bfloat162_rn(first, second);
    memcpy(&pair, &halves, sizeof pair);
  }
  return pair;
}

// ---- vectors: kWidth neighbours, read and written at once where they fit kVectorBytes ----

template <class T, int kWidth>
struct alignas(sizeof(T) * kWidth < kVectorBytes ? sizeof(T) * kWidth : kVectorBytes) Vector {
  T values[kWidth];

  __device__ float operator[](int i) const { return to_float(values[i]); }
  __device__ void set(int i, float value) { values[i] = from_float<T>(value); }
};

// How many elements make kVectorBytes.
template <class T>
constexpr int kFullWidth = kVectorBytes / int(sizeof(T));

template <int kWidth, class T>
__device__ Vector<T, kWidth> load(const T* from) {
  return *reinterpret_cast<const Vector<T, kWidth>*>(from);
}

template <class T, int kWidth>
__device__ void store(T* to, const Vector<T, kWidth>& vector) {
  if constexpr (sizeof vector < kVectorBytes) {
    *reinterpret_cast<Vector<T, kWidth>*>(to) = vector;
  } else {
    // nvcc 13.0 breaks the assignment above into single elements in most of our kernels; an intrinsic stays whole.
    for (size_t i = 0; i < sizeof vector / kVectorBytes; ++i) {
      uint4 word;
      memcpy(&word, reinterpret_cast<const char*>(&vector) + i * kVectorBytes, kVectorBytes);
      __stwb(reinterpret_cast<uint4*>(to) + i, word);
    }
  }
}

// The same where an array may end within the vector: only `count` elements are touched.
template <int kWidth, class T>
__device__ Vector<T, kWidth> load(const T* from, int64_t count) {
  if (count >= kWidth) return load<kWidth>(from);
  Vector<T, kWidth> vector{};
  for (int i = 0; i < kWidth; ++i)
    if (i < count) vector.values[i] = from[i];
  return vector;
}

template <class T, int kWidth>
__device__ void store(T* to, const Vector<T, kWidth>& vector, int64_t count) {
  if (count >= kWidth) return store(to, vector);
  for (int i = 0; i < kWidth; ++i)
    if (i < count) to[i] = vector.values[i];
}

// ---- reductions: the same bits in every thread, and every time ----

struct Add {
  static constexpr float kNothing = 0.0f;
  __device__ float operator()(float a, float b) const { return a + b; }
};

struct Larger {
  static constexpr float kNothing = -kInfinity;
  __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

template <class Combine>
__device__ float warp_reduce(float value, Combine combine) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2)
    value = combine(value, __shfl_xor_sync(0xffffffffu, value, offset));
  return value;
}

// Over threadIdx.x, apart for each threadIdx.y. Needs blockDim.x a multiple of kWarp, and the whole block to call it
// unless blockDim.x is kWarp.
template <class Combine>
__device__ float row_reduce(float value, Combine combine) {
  value = warp_reduce(value, combine);
  if (blockDim.x == kWarp) return value;
  LLMSYS_SHARED(float, of_warps, kWarp);
  const unsigned lane = threadIdx.x % kWarp, warps = blockDim.x / kWarp, first = threadIdx.y * warps;
  __syncthreads();  // what an earlier call left has been read
  if (lane == 0) of_warps[first + threadIdx.x / kWarp] = value;
  __syncthreads();
  return warp_reduce(lane < warps ? of_warps[first + lane] : Combine::kNothing, combine);
}

__device__ inline float row_sum(float value) { return row_reduce(value, Add{}); }

// The largest; NaN is passed over where another is none.
__device__ inline float row_max(float value) { return row_reduce(value, Larger{}); }

}  // namespace llmsys::cuda
