#include "../cross_entropy.h"

#include <algorithm>
#include <cmath>

#include "device.cuh"

namespace llmsys::cuda {
namespace {

constexpr int kMaxThreads = 512;  // a block has one row

// What a call has in common for all rows.
struct Call {
  const float* weight;
  int64_t classes;
  float smoothing, z_loss, softcap;

  __device__ bool in_range(int64_t target) const { return target >= 0 && target < classes; }
  __device__ float weight_of(int64_t target) const { return weight ? weight[target] : 1.0f; }
  __device__ float z(float x) const { return softcap != 0.0f ? softcap * tanhf(x / softcap) : x; }
  __device__ float slope(float z) const { return softcap != 0.0f ? 1.0f - (z / softcap) * (z / softcap) : 1.0f; }
};

template <class Args>
Call call_of(const Args& args) {
  return {args.weight, args.classes, args.label_smoothing, args.z_loss, args.softcap};
}

// A sum of exponentials: total · e^shift, with shift 0 while the largest is infinite.
struct Sum {
  float highest = -INFINITY, shift = 0.0f, total = 0.0f;

  __device__ void raise(float to) {
    if (to <= highest) return;
    const float next = fabsf(to) == INFINITY ? 0.0f : to;
    if (total != 0.0f) total *= expf(shift - next);
    highest = to;
    shift = next;
  }
};

// Calls visit(v) for each vector v of a row that is this thread's.
template <class Visit>
__device__ void for_each_vector(int64_t vectors, Visit visit) {
  for (int64_t v = threadIdx.x; v < vectors; v += blockDim.x) visit(v);
}

// The log of the sum of e^z over a row, in every thread of the block that has it.
template <class T, int kWidth>
__device__ float log_sum_exp(const T* logits, const Call& call) {
  Sum sum;
  for_each_vector(call.classes / kWidth, [&](int64_t v) {
    const Vector<T, kWidth> x = load<kWidth>(logits + v * kWidth);
    float z[kWidth], highest = -INFINITY;
    for (int k = 0; k < kWidth; ++k) {
      z[k] = call.z(x[k]);
      highest = fmaxf(highest, z[k]);
    }
    sum.raise(highest);
    for (int k = 0; k < kWidth; ++k) sum.total += expf(z[k] - sum.shift);
  });
  sum.raise(row_max(sum.highest));
  return sum.shift + logf(row_sum(sum.total));
}

// dz[c] = along · e^(z[c] - lse) - uniform · w[c] - (c == target) · at_target
struct Gradient {
  float along, uniform, at_target;
};

__device__ Gradient gradient_of(const Call& call, int64_t target, float lse, float dloss, float dlse,
                                float total_weight) {
  const float w = call.in_range(target) ? call.weight_of(target) : NAN;
  Gradient g;
  g.uniform = dloss * call.smoothing / float(call.classes);
  g.at_target = dloss * w * (1.0f - call.smoothing);
  g.along = g.at_target + g.uniform * total_weight + dlse;
  if (call.z_loss != 0.0f) g.along += dloss * w * 2.0f * call.z_loss * lse;
  return g;
}

// Each thread reads a vector before it writes the same one: dlogits may be the logits.
template <class T, int kWidth>
__device__ void write_gradient(const T* logits, T* dlogits, const Call& call, const Gradient& g, int64_t target,
                               float lse) {
  for_each_vector(call.classes / kWidth, [&](int64_t v) {
    const Vector<T, kWidth> x = load<kWidth>(logits + v * kWidth);
    Vector<T, kWidth> out;
    for (int k = 0; k < kWidth; ++k) {
      const int64_t c = v * kWidth + k;
      const float z = call.z(x[k]);
      float dz = g.along * expf(z - lse);
      if (call.smoothing != 0.0f) dz -= g.uniform * call.weight_of(c);
      if (c == target) dz -= g.at_target;
      out.set(k, dz * call.slope(z));
    }
    store(dlogits + v * kWidth, out);
  });
}

template <class T, int kWidth>
__device__ void write_zeros(T* dlogits, int64_t classes) {
  for_each_vector(classes / kWidth, [&](int64_t v) { store(dlogits + v * kWidth, Vector<T, kWidth>{}); });
}

// The sum of the classes' weights, in every thread.
__device__ float total_weight_of(const Call& call) {
  if (!call.weight || call.smoothing == 0.0f) return float(call.classes);
  float total = 0.0f;
  for_each_vector(call.classes, [&](int64_t c) { total += call.weight[c]; });
  return row_sum(total);
}

template <class T, int kWidth>
__global__ void __launch_bounds__(kMaxThreads) forward_kernel(const CrossEntropyForward args, const Call call) {
  for (int64_t row = blockIdx.x; row < args.rows; row += gridDim.x) {
    const T* logits = static_cast<const T*>(args.logits) + row * args.logits_stride;
    T* dlogits = args.dlogits ? static_cast<T*>(args.dlogits) + row * args.dlogits_stride : nullptr;
    const int64_t target = args.target[row];
    if (target == args.ignore_index) {
      if (threadIdx.x == 0) args.loss[row] = args.lse[row] = 0.0f;
      if (dlogits) write_zeros<T, kWidth>(dlogits, call.classes);
      continue;
    }
    // Read before the barriers of the sums: after them, another thread may have written its gradient.
    const float z_target = call.in_range(target) ? call.z(to_float(logits[target])) : NAN;
    const float lse = log_sum_exp<T, kWidth>(logits, call);
    float others = 0.0f;
    if (call.smoothing != 0.0f) {
      for_each_vector(call.classes, [&](int64_t c) {
        const float term = lse - call.z(to_float(logits[c]));
        others += call.weight ? call.weight[c] * term : term;
      });
      others = row_sum(others) * call.smoothing / float(call.classes);
    }
    const float total_weight = total_weight_of(call);
    if (threadIdx.x == 0) {
      const float w = call.in_range(target) ? call.weight_of(target) : NAN;
      const float z_part = call.z_loss != 0.0f ? call.z_loss * lse * lse : 0.0f;
      args.loss[row] = w * ((1.0f - call.smoothing) * (lse - z_target) + z_part) + others;
      args.lse[row] = lse;
    }
    if (!dlogits) continue;
    const float scale = args.scale ? args.scale[row] : 1.0f;
    write_gradient<T, kWidth>(logits, dlogits, call, gradient_of(call, target, lse, scale, 0.0f, total_weight), target,
                              lse);
  }
}

template <class T, int kWidth>
__global__ void __launch_bounds__(kMaxThreads) backward_kernel(const CrossEntropyBackward args, const Call call) {
  for (int64_t row = blockIdx.x; row < args.rows; row += gridDim.x) {
    const T* logits = static_cast<const T*>(args.logits) + row * args.logits_stride;
    T* dlogits = static_cast<T*>(args.dlogits) + row * args.dlogits_stride;
    const int64_t target = args.target[row];
    if (target == args.ignore_index) {
      write_zeros<T, kWidth>(dlogits, call.classes);
      continue;
    }
    const float dlse = args.dlse ? args.dlse[row] : 0.0f, lse = args.lse[row];
    const Gradient g = gradient_of(call, target, lse, args.dloss[row], dlse, total_weight_of(call));
    write_gradient<T, kWidth>(logits, dlogits, call, g, target, lse);
  }
}

// A block for each row, of as many threads as have a vector each.
template <class Args>
Grid grid_for(const Args& args, int width) {
  const int64_t threads = std::clamp<int64_t>(ceil_div(args.classes / width, kWarp) * kWarp, kWarp, kMaxThreads);
  return {dim3(unsigned(std::min(args.rows, kMaxBlocks))), dim3(unsigned(threads))};
}

}  // namespace

void cross_entropy_forward(const CrossEntropyForward& args, void* stream) {
  if (args.rows == 0) return;
  with_type(args.dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int kWidth = kFullWidth<T>;
    const bool whole = (args.classes | args.logits_stride | args.dlogits_stride) % kWidth == 0;
    const bool vectors = whole && aligned(args.logits, args.dlogits);
    launch("cross_entropy_forward", grid_for(args, vectors ? kWidth : 1), stream,
           vectors ? forward_kernel<T, kWidth> : forward_kernel<T, 1>, args, call_of(args));
  });
}

void cross_entropy_backward(const CrossEntropyBackward& args, void* stream) {
  if (args.rows == 0) return;
  with_type(args.dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int kWidth = kFullWidth<T>;
    const bool whole = (args.classes | args.logits_stride | args.dlogits_stride) % kWidth == 0;
    const bool vectors = whole && aligned(args.logits, args.dlogits);
    launch("cross_entropy_backward", grid_for(args, vectors ? kWidth : 1), stream,
           vectors ? backward_kernel<T, kWidth> : backward_kernel<T, 1>, args, call_of(args));
  });
}

}  // namespace llmsys::cuda
