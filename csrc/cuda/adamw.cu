#include "../adamw.h"

#include <cmath>

#include "device.cuh"

namespace llmsys::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWidth = 4;                 // four float32 fill a vector
constexpr int64_t kBlockElements = 4096;  // of one tensor, by one block
constexpr int kBatchTensors = 64;

// One launch: as many tensors as its arguments hold. What all elements share is computed in float64 and rounded once.
struct Batch {
  AdamWTensor tensors[kBatchTensors];
  unsigned end_block[kBatchTensors];  // blocks of tensor t and of those before it
  int num_tensors;
  float decay, toward_grad, beta2, one_minus_beta2, step_size, eps;
  bool from_grad;  // m starts from g, not from m: see adamw.h
  bool maximize;
  const float* grad_scale;
};
static_assert(sizeof(Batch) <= 4096, "kernel arguments hold 4 KiB");

// Updates kW elements from `at` on.
template <class P, class G, int kW>
__device__ void update(const Batch& batch, const AdamWTensor& tensor, int64_t at, float grad_scale) {
  P* param = static_cast<P*>(tensor.param) + at;
  const auto grads = load<kW>(static_cast<const G*>(tensor.grad) + at);
  auto m = load<kW>(tensor.exp_avg + at), v = load<kW>(tensor.exp_avg_sq + at);
  Vector<P, kW> params;
  Vector<float, kW> p;
  if (tensor.master) {
    p = load<kW>(tensor.master + at);
  } else {
    params = load<kW>(param);
    for (int k = 0; k < kW; ++k) p.set(k, params[k]);
  }
  for (int k = 0; k < kW; ++k) {
    const float g = grads[k] * grad_scale;
    m.set(k, fmaf(g - m[k], batch.toward_grad, batch.from_grad ? g : m[k]));
    v.set(k, fmaf(v[k], batch.beta2, g * batch.one_minus_beta2 * g));
    p.set(k, fmaf(p[k], batch.decay, -(batch.step_size * m[k] / (sqrtf(v[k]) + batch.eps))));
    params.set(k, p[k]);
  }
  store(param, params);
  store(tensor.exp_avg + at, m);
  store(tensor.exp_avg_sq + at, v);
  if (tensor.master) store(tensor.master + at, p);
}

template <class P, class G>
__global__ void __launch_bounds__(kThreads) adamw_kernel(const __grid_constant__ Batch batch) {
  int t = 0;
  while (blockIdx.x >= batch.end_block[t]) ++t;
  const AdamWTensor tensor = batch.tensors[t];
  const int64_t begin = int64_t(blockIdx.x - (t == 0 ? 0 : batch.end_block[t - 1])) * kBlockElements;
  const int64_t end = begin + kBlockElements < tensor.numel ? begin + kBlockElements : tensor.numel;
  const float scale = batch.grad_scale ? *batch.grad_scale : 1.0f, grad_scale = batch.maximize ? -scale : scale;
  const uintptr_t addresses = reinterpret_cast<uintptr_t>(tensor.param) | reinterpret_cast<uintptr_t>(tensor.grad) |
                              reinterpret_cast<uintptr_t>(tensor.exp_avg) |
                              reinterpret_cast<uintptr_t>(tensor.exp_avg_sq) |
                              reinterpret_cast<uintptr_t>(tensor.master);
  const int64_t whole = addresses % kVectorBytes == 0 ? end - end % kWidth : begin;
  for (int64_t at = begin + threadIdx.x * kWidth; at < whole; at += kThreads * kWidth)
    update<P, G, kWidth>(batch, tensor, at, grad_scale);
  for (int64_t at = whole + threadIdx.x; at < end; at += kThreads) update<P, G, 1>(batch, tensor, at, grad_scale);
}

template <class P, class G>
void run(const AdamW& args, void* stream) {
  Batch batch{};
  batch.decay = float(1.0 - args.lr * args.weight_decay);
  batch.from_grad = args.beta1 <= 0.5;
  batch.toward_grad = float(batch.from_grad ? -args.beta1 : 1.0 - args.beta1);
  batch.beta2 = float(args.beta2);
  batch.one_minus_beta2 = float(1.0 - args.beta2);
  // sqrt(bias_correction2) taken out of the denominator: one division an element instead of two.
  const double correction2 = std::sqrt(args.bias_correction2);
  batch.step_size = float(args.lr / args.bias_correction1 * correction2);
  batch.eps = float(args.eps * correction2);
  batch.maximize = args.maximize;
  batch.grad_scale = args.grad_scale;
  unsigned num_blocks = 0;
  auto flush = [&] {
    if (num_blocks > 0) launch("adamw", {dim3(num_blocks), dim3(kThreads)}, stream, adamw_kernel<P, G>, batch);
    batch.num_tensors = 0;
    num_blocks = 0;
  };
  for (int64_t t = 0; t < args.num_tensors; ++t) {
    const int64_t blocks = ceil_div(args.tensors[t].numel, kBlockElements);
    if (blocks == 0) continue;
    if (batch.num_tensors == kBatchTensors || num_blocks + blocks > kMaxBlocks) flush();
    num_blocks += unsigned(blocks);
    batch.tensors[batch.num_tensors] = args.tensors[t];
    batch.end_block[batch.num_tensors++] = num_blocks;
  }
  flush();
}

}  // namespace

void adamw(const AdamW& args, void* stream) {
  with_type(args.param_dtype, [&](auto param) {
    with_type(args.grad_dtype, [&](auto grad) { run<decltype(param), decltype(grad)>(args, stream); });
  });
}

}  // namespace llmsys::cuda
