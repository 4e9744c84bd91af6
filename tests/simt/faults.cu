// Kernels that reverse an array, each as it should be and with one mistake: `faults KERNEL right|wrong [SEED]`.
// Prints "right" or "wrong result" for the outcome, or the error that stopped it.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "device.cuh"

using llmsys::cuda::kWarp;

constexpr int kThreads = 2 * kWarp;
constexpr unsigned kAllLanes = 0xffffffffu;

using Kernel = void (*)(const int* in, int* out);

template <bool kMistake>
__global__ void missing_barrier(const int* in, int* out) {
  LLMSYS_SHARED(int, values, kThreads);
  values[threadIdx.x] = in[threadIdx.x];
  if (!kMistake) __syncthreads();
  out[threadIdx.x] = values[kThreads - 1 - threadIdx.x];
}

template <bool kMistake>
__global__ void missing_barrier_before_reuse(const int* in, int* out) {
  LLMSYS_SHARED(int, values, kThreads);
  values[threadIdx.x] = in[threadIdx.x] + 1;
  __syncthreads();
  const int value = values[kThreads - 1 - threadIdx.x];
  if (!kMistake) __syncthreads();
  values[threadIdx.x] = value - 1;
  __syncthreads();
  out[threadIdx.x] = values[threadIdx.x];
}

template <bool kMistake>
__global__ void missing_barrier_in_global_memory(const int* in, int* out) {
  out[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  const int value = out[kThreads - 1 - threadIdx.x];
  if (!kMistake) __syncthreads();
  out[threadIdx.x] = value;
}

template <bool kMistake>
__global__ void missing_syncwarp(const int* in, int* out) {
  LLMSYS_SHARED(int, values, kThreads);
  const int mirrored = threadIdx.x ^ (kWarp - 1);
  values[threadIdx.x] = in[kThreads - 1 - mirrored];
  if (!kMistake) __syncwarp();
  out[threadIdx.x] = values[mirrored];
}

template <bool kMistake>
__global__ void divergent_barrier(const int* in, int* out) {
  LLMSYS_SHARED(int, values, kThreads);
  values[threadIdx.x] = in[threadIdx.x];
  if (kMistake && threadIdx.x < kWarp) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = values[kThreads - 1 - threadIdx.x];
}

template <bool kMistake>
__global__ void barrier_after_exit(const int* in, int* out) {
  out[threadIdx.x] = in[kThreads - 1 - threadIdx.x];
  if (kMistake && threadIdx.x == 5) return;
  __syncthreads();
}

template <bool kMistake>
__global__ void divergent_shuffle(const int* in, int* out) {
  const int from = in[kThreads - 1 - (threadIdx.x ^ 1)];
  int value = in[kThreads - 1 - threadIdx.x];
  if (!kMistake || threadIdx.x % 2 == 0) value = __shfl_xor_sync(kAllLanes, from, 1);
  out[threadIdx.x] = value;
}

template <bool kMistake>
__global__ void shuffle_against_barrier(const int* in, int* out) {
  if (kMistake && threadIdx.x % 2 == 0) __syncthreads();
  out[threadIdx.x] = __shfl_xor_sync(kAllLanes, in[kThreads - 1 - (threadIdx.x ^ 1)], 1);
  if (!kMistake || threadIdx.x % 2 == 1) __syncthreads();
}

template <bool kMistake>
__global__ void shuffle_masks_differ(const int* in, int* out) {
  const unsigned half = threadIdx.x % kWarp < kWarp / 2 ? 0x0000ffffu : 0xffff0000u;
  const unsigned mask = kMistake && threadIdx.x % kWarp == 0 ? kAllLanes : half;
  out[threadIdx.x] = __shfl_xor_sync(mask, in[kThreads - 1 - (threadIdx.x ^ 1)], 1);
}

template <bool kMistake>
__global__ void shuffle_reads_outside_mask(const int* in, int* out) {
  const unsigned half = threadIdx.x % kWarp < kWarp / 2 ? 0x0000ffffu : 0xffff0000u;
  const int distance = kMistake ? kWarp / 2 : 1;
  out[threadIdx.x] = __shfl_xor_sync(half, in[kThreads - 1 - (threadIdx.x ^ distance)], distance);
}

template <bool kMistake>
__global__ void unwritten_shared_memory(const int* in, int* out) {
  LLMSYS_SHARED(int, values, kThreads);
  if (!kMistake || threadIdx.x > 0) values[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = values[kThreads - 1 - threadIdx.x];
}

template <bool kMistake>
__global__ void shared_out_of_bounds(const int* in, int* out) {
  LLMSYS_SHARED(int, values, kThreads - kMistake);
  values[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = values[kThreads - 1 - threadIdx.x];
}

template <bool kMistake>
__global__ void dynamic_shared_out_of_bounds(const int* in, int* out) {
  LLMSYS_DYNAMIC_SHARED(int, values);
  values[threadIdx.x + kMistake] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = values[kThreads - 1 - threadIdx.x + kMistake];
}

constexpr size_t kMostSharedBytes = 163 << 10;  // of a block on sm_80

template <bool kMistake>
__global__ void too_much_shared_memory(const int* in, int* out) {
  LLMSYS_SHARED(int, values, kThreads + kMistake);
  values[threadIdx.x] = in[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = values[kThreads - 1 - threadIdx.x];
}

template <bool kMistake>
__global__ void missing_wait(const int* in, int* out) {
  LLMSYS_SHARED(int, values, kThreads);
  llmsys::cuda::copy_async(values + threadIdx.x, in + threadIdx.x, true);
  llmsys::cuda::commit_copies();
  llmsys::cuda::wait_for_copies<kMistake>();
  __syncthreads();
  out[threadIdx.x] = values[kThreads - 1 - threadIdx.x];
  if (kMistake) llmsys::cuda::wait_for_copies<0>();
}

template <bool kMistake>
__global__ void missing_commit(const int* in, int* out) {
  LLMSYS_SHARED(int, values, kThreads);
  llmsys::cuda::copy_async(values + threadIdx.x, in + threadIdx.x, true);
  if (!kMistake) llmsys::cuda::commit_copies();
  llmsys::cuda::wait_for_copies<0>();
  __syncthreads();
  out[threadIdx.x] = values[kThreads - 1 - threadIdx.x];
}

template <bool kMistake>
__global__ void missing_barrier_after_wait(const int* in, int* out) {
  LLMSYS_SHARED(int, values, kThreads);
  llmsys::cuda::copy_async(values + threadIdx.x, in + threadIdx.x, true);
  llmsys::cuda::commit_copies();
  if (kMistake) __syncthreads();
  llmsys::cuda::wait_for_copies<0>();
  if (!kMistake) __syncthreads();
  out[threadIdx.x] = values[kThreads - 1 - threadIdx.x];
}

template <bool kMistake>
__global__ void missing_barrier_before_copy(const int* in, int* out) {
  LLMSYS_SHARED(int, values, kThreads);
  values[threadIdx.x] = threadIdx.x;
  __syncthreads();
  const int from = values[kThreads - 1 - threadIdx.x];
  if (!kMistake) __syncthreads();
  llmsys::cuda::copy_async(values + threadIdx.x, in + from, true);
  llmsys::cuda::commit_copies();
  __syncthreads();
  llmsys::cuda::wait_for_copies<0>();
  out[threadIdx.x] = values[threadIdx.x];
}

template <bool kMistake>
__global__ void exit_before_wait(const int* in, int* out) {
  LLMSYS_SHARED(int, values, kThreads);
  out[threadIdx.x] = in[kThreads - 1 - threadIdx.x];
  llmsys::cuda::copy_async(values + threadIdx.x, in + threadIdx.x, true);
  llmsys::cuda::commit_copies();
  if (!kMistake) llmsys::cuda::wait_for_copies<0>();
}

template <bool kMistake>
__global__ void divergent_mma(const int* in, int* out) {
  float sums[4] = {};
  const uint32_t a[4] = {}, b[2] = {};
  if (!kMistake || threadIdx.x % 2 == 0) llmsys::cuda::mma<__half>(sums, a, b);
  out[threadIdx.x] = in[kThreads - 1 - threadIdx.x] + int(sums[0]);
}

template <bool kMistake>
__global__ void global_out_of_bounds(const int* in, int* out) {
  out[threadIdx.x] = in[kThreads - 1 - threadIdx.x];
  if (kMistake && threadIdx.x == 0) out[kThreads] = 0;
}

template <bool kMistake>
__global__ void unaligned_vector(const int* in, int* out) {
  using namespace llmsys::cuda;
  if (threadIdx.x % 4 != 0) return;
  const int from = kThreads - 4 - threadIdx.x - (kMistake && threadIdx.x == 0);
  const Vector<int, 4> values = load<4>(in + from);
  for (int i = 0; i < 4; ++i) out[threadIdx.x + i] = values.values[3 - i];
}

struct Fault {
  const char* name;
  Kernel right, wrong;
  size_t shared_bytes = kThreads * sizeof(int);
};

#define FAULT(kernel) {#kernel, kernel<false>, kernel<true>}
constexpr Fault kFaults[] = {FAULT(missing_barrier),
                             FAULT(missing_barrier_before_reuse),
                             FAULT(missing_barrier_in_global_memory),
                             FAULT(missing_syncwarp),
                             FAULT(divergent_barrier),
                             FAULT(barrier_after_exit),
                             FAULT(divergent_shuffle),
                             FAULT(shuffle_against_barrier),
                             FAULT(shuffle_masks_differ),
                             FAULT(shuffle_reads_outside_mask),
                             FAULT(unwritten_shared_memory),
                             FAULT(shared_out_of_bounds),
                             FAULT(dynamic_shared_out_of_bounds),
                             {"too_much_shared_memory", too_much_shared_memory<false>, too_much_shared_memory<true>,
                              kMostSharedBytes - kThreads * sizeof(int)},
                             FAULT(missing_wait),
                             FAULT(missing_commit),
                             FAULT(missing_barrier_after_wait),
                             FAULT(missing_barrier_before_copy),
                             FAULT(exit_before_wait),
                             FAULT(divergent_mma),
                             FAULT(global_out_of_bounds),
                             FAULT(unaligned_vector)};

int main(int, char** arguments) {
  const bool mistake = std::strcmp(arguments[2], "wrong") == 0;
  if (arguments[3]) simt_seed(std::strtoull(arguments[3], nullptr, 10));
  for (const Fault& fault : kFaults) {
    if (std::strcmp(fault.name, arguments[1]) != 0) continue;
    std::unique_ptr<int[]> in(new int[kThreads]), out(new int[kThreads]());
    for (int i = 0; i < kThreads; ++i) in[i] = 100 + i;
    try {
      llmsys::cuda::launch(fault.name, {dim3(1), dim3(kThreads), fault.shared_bytes}, nullptr,
                           mistake ? fault.wrong : fault.right, in.get(), out.get());
    } catch (const std::runtime_error& error) {
      std::puts(error.what());
      return 0;
    }
    bool reversed = true;
    for (int i = 0; i < kThreads; ++i) reversed = reversed && out[i] == in[kThreads - 1 - i];
    std::puts(reversed ? "right" : "wrong result");
    return 0;
  }
  std::printf("no kernel is named %s\n", arguments[1]);
  return 2;
}
