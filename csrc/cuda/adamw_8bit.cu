#include "../adamw_8bit.h"

#include <cmath>

#include "../dynamic_map.h"
#include "device.cuh"

namespace llmsys::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWidth = 8;  // elements a thread: a warp takes one block of the states
constexpr int kWarps = kThreads / kWarp;
constexpr int kBatchTensors = 32;
static_assert(kWidth * kWarp == kAdamW8bitBlock);

// One launch: as many tensors as its arguments hold. What all elements share is computed in float64 and rounded once.
struct Batch {
  AdamW8bitTensor tensors[kBatchTensors];
  unsigned end_block[kBatchTensors];  // thread blocks of tensor t and of those before it
  int num_tensors;
  float decay, toward_grad, beta2, one_minus_beta2, step_size, eps;
  bool from_grad;  // m starts from g, not from m: see adamw.h
  bool maximize;
  const float* grad_scale;
  DynamicMap signed_map, unsigned_map;
};
static_assert(sizeof(Batch) <= 4096, "kernel arguments hold 4 KiB");

__device__ unsigned bits_of(float value) {
  unsigned bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

// The map's tables, an entry in each lane, over and over: lanes look up each other's. All lanes of the warp must take
// part. See dynamic_map.h.
struct Lookup {
  float step, offset, slope, intercept, below_two;
  unsigned decade;

  __device__ explicit Lookup(const DynamicMap& map) : intercept(map.intercept), below_two(map.below_two) {
    step = map.step[threadIdx.x % 8];
    offset = map.offset[threadIdx.x % 8];
    slope = map.slope[threadIdx.x % 8];
    decade = map.decade[threadIdx.x % 16];
  }

  template <class T>
  __device__ static T of(T table, unsigned entry) {
    return __shfl_sync(0xffffffffu, table, entry % 16);
  }

  __device__ float number(float j) const {
    const unsigned e = bits_of(j) >> 23;
    return fmaf(of(step, e), j, of(offset, e));
  }

  __device__ int place(float y) const {
    y = fmaxf(y, kSmallestQuotient);
    const unsigned bits = bits_of(y), e = (bits + of(decade, bits >> 24)) >> 24;
    return int(ldexpf(fminf(fmaf(of(slope, e), y, intercept), below_two), int(e)));
  }
};

__device__ float decode_signed(const Lookup& map, int code) {
  const int k = code - kSignedZero;
  const float number = map.number(float(4 * (k < 0 ? -k : k)));
  return k < 0 ? -number : number;
}

__device__ float decode_unsigned(const Lookup& map, int code) { return map.number(float(2 * code + 2)); }

__device__ int encode_signed(const Lookup& map, float y) {
  const int k = map.place(fabsf(y)), code = kSignedZero + (y < 0 ? -k : k);
  return code < 0 ? 0 : code;  // -1 has no code of its own, as 1 has
}

__device__ int encode_unsigned(const Lookup& map, float y) {
  const int j = map.place(y);
  return j < 1 ? 0 : j - 1;
}

// A block's scale, from each lane's largest bits of a magnitude: in the order of bits, NaN is above all.
__device__ float scale_of(unsigned largest) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const unsigned other = __shfl_xor_sync(0xffffffffu, largest, offset);
    if (other > largest) largest = other;
  }
  if (largest < 0x00800000u) largest = 0x00800000u;  // 2^-126, whose inverse is finite
  if (largest >= 0x7f800000u) largest = 0x7fc00000u;
  float scale;
  memcpy(&scale, &largest, sizeof scale);
  return scale;
}

// kWidth elements, `count` of them in the array; at once where `whole` says that they all are and addresses allow.
template <class T>
__device__ Vector<T, kWidth> load_some(const T* from, int64_t count, bool whole) {
  if (whole) return load<kWidth>(from);
  Vector<T, kWidth> vector{};
  for (int k = 0; k < kWidth; ++k)
    if (k < count) vector.values[k] = from[k];
  return vector;
}

template <class T>
__device__ void store_some(T* to, const Vector<T, kWidth>& vector, int64_t count, bool whole) {
  if (whole) return store(to, vector);
  for (int k = 0; k < kWidth; ++k)
    if (k < count) to[k] = vector.values[k];
}

template <class P, class G>
__global__ void __launch_bounds__(kThreads) adamw_8bit_kernel(const __grid_constant__ Batch batch) {
  int t = 0;
  while (blockIdx.x >= batch.end_block[t]) ++t;
  const AdamW8bitTensor& tensor = batch.tensors[t];
  const unsigned first = t == 0 ? 0 : batch.end_block[t - 1];
  const int64_t number = int64_t(blockIdx.x - first) * kWarps + threadIdx.x / kWarp;
  if (number * kAdamW8bitBlock >= tensor.numel) return;  // all lanes of a warp alike
  const Lookup signed_map(batch.signed_map), unsigned_map(batch.unsigned_map);
  const float scale = batch.grad_scale ? *batch.grad_scale : 1.0f, grad_scale = batch.maximize ? -scale : scale;
  const int64_t at = number * kAdamW8bitBlock + threadIdx.x % kWarp * kWidth, count = tensor.numel - at;
  const uintptr_t addresses = reinterpret_cast<uintptr_t>(tensor.param) | reinterpret_cast<uintptr_t>(tensor.grad) |
                              reinterpret_cast<uintptr_t>(tensor.exp_avg) |
                              reinterpret_cast<uintptr_t>(tensor.exp_avg_sq) |
                              reinterpret_cast<uintptr_t>(tensor.master);
  const bool whole = count >= kWidth && addresses % kVectorBytes == 0;

  P* param = static_cast<P*>(tensor.param) + at;
  const auto grads = load_some(static_cast<const G*>(tensor.grad) + at, count, whole);
  auto ms = load_some(tensor.exp_avg + at, count, whole), vs = load_some(tensor.exp_avg_sq + at, count, whole);
  Vector<P, kWidth> params;
  Vector<float, kWidth> p;
  if (tensor.master) {
    p = load_some(tensor.master + at, count, whole);
  } else {
    params = load_some(param, count, whole);
    for (int k = 0; k < kWidth; ++k) p.set(k, params[k]);
  }
  const float m_scale = tensor.exp_avg_scale[number], v_scale = tensor.exp_avg_sq_scale[number];
  float m[kWidth], v[kWidth];
  unsigned m_largest = 0, v_largest = 0;
  for (int k = 0; k < kWidth; ++k) {
    const float g = grads[k] * grad_scale;
    m[k] = decode_signed(signed_map, ms.values[k]) * m_scale;
    v[k] = decode_unsigned(unsigned_map, vs.values[k]) * v_scale;
    m[k] = fmaf(g - m[k], batch.toward_grad, batch.from_grad ? g : m[k]);
    v[k] = fmaf(v[k], batch.beta2, g * batch.one_minus_beta2 * g);
    p.set(k, fmaf(p[k], batch.decay, -(batch.step_size * m[k] / (sqrtf(v[k]) + batch.eps))));
    params.set(k, p[k]);
    if (k < count) {
      const unsigned m_bits = bits_of(fabsf(m[k])), v_bits = bits_of(fabsf(v[k]));
      if (m_bits > m_largest) m_largest = m_bits;
      if (v_bits > v_largest) v_largest = v_bits;
    }
  }
  if (tensor.master) store_some(tensor.master + at, p, count, whole);
  store_some(param, params, count, whole);
  const float new_m_scale = scale_of(m_largest), new_v_scale = scale_of(v_largest);
  const bool m_finite = new_m_scale == new_m_scale, v_finite = new_v_scale == new_v_scale;
  for (int k = 0; k < kWidth; ++k) {
    // Lanes look up together: those beyond the end, and of blocks that are not finite, encode 0.
    const bool inside = k < count;
    ms.values[k] = uint8_t(encode_signed(signed_map, inside && m_finite ? m[k] / new_m_scale : 0.0f));
    vs.values[k] = uint8_t(encode_unsigned(unsigned_map, inside && v_finite ? v[k] / new_v_scale : 0.0f));
  }
  store_some(tensor.exp_avg + at, ms, count, whole);
  store_some(tensor.exp_avg_sq + at, vs, count, whole);
  if (threadIdx.x % kWarp == 0) {
    tensor.exp_avg_scale[number] = new_m_scale;
    tensor.exp_avg_sq_scale[number] = new_v_scale;
  }
}

template <class P, class G>
void run(const AdamW8bit& args, void* stream) {
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
  batch.signed_map = kSignedMap;
  batch.unsigned_map = kUnsignedMap;
  unsigned num_blocks = 0;
  auto flush = [&] {
    if (num_blocks > 0)
      launch("adamw_8bit", {dim3(num_blocks), dim3(kThreads)}, stream, adamw_8bit_kernel<P, G>, batch);
    batch.num_tensors = 0;
    num_blocks = 0;
  };
  for (int64_t t = 0; t < args.num_tensors; ++t) {
    const int64_t blocks = ceil_div(args.tensors[t].numel, kAdamW8bitBlock * kWarps);
    if (blocks == 0) continue;
    if (batch.num_tensors == kBatchTensors || num_blocks + blocks > kMaxBlocks) flush();
    num_blocks += unsigned(blocks);
    batch.tensors[batch.num_tensors] = args.tensors[t];
    batch.end_block[batch.num_tensors++] = num_blocks;
  }
  flush();
}

}  // namespace

void adamw_8bit(const AdamW8bit& args, void* stream) {
  with_type(args.param_dtype, [&](auto param) {
    with_type(args.grad_dtype, [&](auto grad) { run<decltype(param), decltype(grad)>(args, stream); });
  });
}

}  // namespace llmsys::cuda
