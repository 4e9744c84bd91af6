// Stands in for CUDA's <cuda_runtime.h>: the part of it that csrc/cuda uses, run on the CPU by simt.cpp.
//
// A block runs at a time, its threads in random order, each until it waits for others. What a GPU leaves undefined ends
// the launch with an error that names the block, the thread and the cause: lanes that call different warp functions, or
// with different masks, or have exited; a barrier that not all threads reach; races on shared memory, also with copies
// that nobody has waited for; more shared memory than a block has, what the kernel declares included.
// Blocks that wait for each other cannot run here. What CUDA has and this header lacks does not compile: add it.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>

#include "shared.h"

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)

struct uint3 {
  unsigned x, y, z;
};

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

template <class T>
T min(T a, T b) {
  return b < a ? b : a;
}

// A plain store; the suffix names a way of caching.
template <class T>
void __stwb(T* to, T value) {
  *to = value;
}

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

// ---- launches ----

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchFailure = 719
};
using cudaStream_t = struct CUstream_st*;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

// What went wrong in the last launch.
const char* cudaGetErrorString(cudaError_t error);

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };

namespace simt {
cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, const std::function<void()>& thread);
cudaError_t allow_shared_memory(const void* kernel, int bytes);
}  // namespace simt

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int value) {
  return simt::allow_shared_memory(reinterpret_cast<const void*>(kernel), value);
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  static_assert((std::is_trivially_copyable_v<std::decay_t<Parameters>> && ...),
                "kernel arguments are copied as bytes");
  static_assert((sizeof(Parameters) + ... + 0) <= 4096, "kernel arguments hold 4 KiB");
  return simt::launch(*config, reinterpret_cast<const void*>(kernel), [&] { kernel(arguments...); });
}

// ---- barriers and warp functions ----

namespace simt {

// Where a thread waits, for messages.
struct Site {
  const char* function;
  const char* file;
  int line;
};

void barrier(const Site& site);

int lane();
// Waits for the lanes of `mask`; the last one calls `together` with what each has brought, by lane.
void meet(const Site& site, unsigned mask, void* brought, const std::function<void(void* const*)>& together);
// Waits for the lanes of `mask`, then gives what `source` sent.
uint64_t exchange(const Site& site, unsigned mask, uint64_t sent, int source);

template <class T>
T shuffle(const Site& site, unsigned mask, T value, int source) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  bits = exchange(site, mask, bits, source);
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace simt

// __builtin_FILE and __builtin_LINE as default arguments are those of the call.
inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  simt::barrier({"__syncthreads", file, line});
}

void __syncwarp(unsigned mask = 0xffffffffu, const char* file = __builtin_FILE(), int line = __builtin_LINE());

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, const char* file = __builtin_FILE(),
              int line = __builtin_LINE()) {
  const int from = (simt::lane() & -width) | (source & (width - 1));
  return simt::shuffle({"__shfl_sync", file, line}, mask, value, from);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = 32, const char* file = __builtin_FILE(),
                  int line = __builtin_LINE()) {
  const int lane = simt::lane(), from = lane ^ lane_mask;
  return simt::shuffle({"__shfl_xor_sync", file, line}, mask, value, from > (lane | (width - 1)) ? lane : from);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, const char* file = __builtin_FILE(),
                   int line = __builtin_LINE()) {
  const int lane = simt::lane(), from = lane + int(delta);
  return simt::shuffle({"__shfl_down_sync", file, line}, mask, value, from > (lane | (width - 1)) ? lane : from);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, const char* file = __builtin_FILE(),
                 int line = __builtin_LINE()) {
  const int lane = simt::lane(), from = lane - int(delta);
  return simt::shuffle({"__shfl_up_sync", file, line}, mask, value, from < (lane & -width) ? lane : from);
}

// ---- for tests, which are no part of CUDA ----

extern "C" {
// Blocks and threads run in another order for each seed, from the next launch on.
__attribute__((visibility("default"))) void simt_seed(uint64_t seed);
// The barrier, or the wait for copies, on this line of the file of this name does nothing, as if it were not there;
// line 0 ends that.
__attribute__((visibility("default"))) void simt_skip_barrier(const char* file, int line);
}

#include "ptx.h"
