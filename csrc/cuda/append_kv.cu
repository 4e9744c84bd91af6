#include "../append_kv.h"

#include <algorithm>

#include "device.cuh"

namespace llmsys::cuda {
namespace {

constexpr int kMaxWarps = 8;
constexpr int64_t kMaxGridRows = 65535;
constexpr float kLargestCode = 127.0f;

// NaN is above all.
struct LargerOrNaN {
  __device__ float operator()(float a, float b) const { return a > b || a != a ? a : b; }
};

// Calls visit(d, vector) for each kWidth elements of a head, which a warp shares out: rotated ones rounded to Rotated,
// the others as they are. Loops are not unrolled: few heads are longer than a warp's vectors, and there are spills.
template <class Rotated, int kWidth, bool kInterleaved, class T, class Visit>
__device__ void each_vector(const Appended& part, const T* x, const float* cos, const float* sin, Visit visit) {
  const int half = int(part.rotary_dim / 2), dim = int(part.dim);
#pragma unroll 1
  for (int i = threadIdx.x * kWidth; i < half; i += kWarp * kWidth) {
    const int at = kInterleaved ? 2 * i : i, apart = kInterleaved ? kWidth : half;
    const auto low = load<kWidth>(x + at), high = load<kWidth>(x + at + apart);
    const auto c = load<kWidth>(cos + i), s = load<kWidth>(sin + i);
    Vector<Rotated, kWidth> turned[2];
    for (int pair = 0; pair < kWidth; ++pair) {
      const int first = kInterleaved ? 2 * pair : pair, second = kInterleaved ? first + 1 : kWidth + pair;
      const float a = first < kWidth ? low[first % kWidth] : high[first % kWidth];
      const float b = second < kWidth ? low[second % kWidth] : high[second % kWidth];
      turned[first / kWidth].set(first % kWidth, a * c[pair] - b * s[pair]);
      turned[second / kWidth].set(second % kWidth, b * c[pair] + a * s[pair]);
    }
    visit(at, turned[0]);
    visit(at + apart, turned[1]);
  }
#pragma unroll 1
  for (int d = 2 * half + threadIdx.x * kWidth; d < dim; d += kWarp * kWidth) visit(d, load<kWidth>(x + d));
}

// A head into its row of a cache whose elements are T, or int8 with a scale. Only a kWidth of 1 takes rows with gaps.
template <int kWidth, bool kInterleaved, class T, class Element>
__device__ void write(const Appended& part, const T* x, const float* cos, const float* sin, Element* row,
                      float* scale_at) {
  const auto put = [&](int d, const Vector<Element, kWidth>& vector) {
    if constexpr (kWidth == 1)
      row[d * part.cache_dim_stride] = vector.values[0];
    else
      store(row + d, vector);
  };
  if constexpr (std::is_same_v<Element, T>) {
    each_vector<T, kWidth, kInterleaved>(part, x, cos, sin, put);
  } else {
    const auto each = [&](auto visit) { each_vector<float, kWidth, kInterleaved>(part, x, cos, sin, visit); };
    float largest = 0.0f;
    each([&](int, const auto& vector) {
      for (int i = 0; i < kWidth; ++i) largest = LargerOrNaN{}(fabsf(vector[i]), largest);
    });
    const float scale = warp_reduce(largest, LargerOrNaN{}) / kLargestCode;
    const bool usable = scale > 0.0f && scale < __builtin_huge_valf();
    if (threadIdx.x == 0) *scale_at = scale;
    each([&](int d, const auto& vector) {
      Vector<int8_t, kWidth> codes;
      for (int i = 0; i < kWidth; ++i) {
        // A subnormal scale is so coarse that quotients may be larger.
        const float code = usable ? fminf(fmaxf(vector[i] / scale, -kLargestCode), kLargestCode) : 0.0f;
        codes.values[i] = int8_t(rintf(code));
      }
      put(d, codes);
    });
  }
}

template <int kWidth, bool kInterleaved, class T, class Element>
__device__ void write_head(const Appended& part, int64_t sequence, int64_t token, int64_t head, int64_t block,
                           int64_t row, const float* cos, const float* sin) {
  write<kWidth, kInterleaved>(
      part,
      static_cast<const T*>(part.x) + sequence * part.batch_stride + token * part.token_stride +
          head * part.head_stride,
      cos, sin,
      static_cast<Element*>(part.cache) + block * part.cache_block_stride + row * part.cache_token_stride +
          head * part.cache_head_stride,
      part.scale + block * part.scale_block_stride + row * part.scale_token_stride + head * part.scale_head_stride);
}

// A block writes a token of each sequence that its row of the grid has, a warp one of its heads of keys or of values.
// Two blocks a multiprocessor: left to itself, nvcc 13.0 keeps to 64 registers and spills.
template <int kWidth, bool kInterleaved, class T, class Element>
__global__ void __launch_bounds__(kMaxWarps* kWarp, 2) append_kv_kernel(const AppendKV args) {
  const int64_t token = blockIdx.x;
  for (int64_t sequence = blockIdx.y; sequence < args.batch; sequence += gridDim.y) {
    const int64_t place = args.cache_seqlens[sequence] + token;
    if (place < 0 || place >= args.block_size * args.max_blocks) continue;
    int64_t block = sequence, row = place;
    if (args.block_table) {
      const int size = int(args.block_size);  // division in 64 bits is a call, which spills
      block = args.block_table[sequence * args.block_table_stride + int(place) / size];
      row = int(place) % size;
    }
    if (block < 0 || block >= args.blocks) continue;
    const int64_t angle = sequence * args.table_batch_stride + token * args.table_token_stride;
    const float *cos = args.cos + angle, *sin = args.sin + angle;
#pragma unroll 1
    for (int64_t head = threadIdx.y; head < 2 * args.heads; head += blockDim.y)
      if (head < args.heads)
        write_head<kWidth, kInterleaved, T, Element>(keys_of(args), sequence, token, head, block, row, cos, sin);
      else
        write_head<kWidth, kInterleaved, T, Element>(values_of(args), sequence, token, head - args.heads, block, row,
                                                     cos, sin);
  }
}

// Whether whole vectors of T, and of the tables, start at every head and at every half.
template <class T>
bool takes_vectors(const AppendKV& args) {
  const int64_t distances = args.dim | args.value_dim | args.rotary_dim / 2 | args.table_batch_stride |
                            args.table_token_stride | args.k_batch_stride | args.k_token_stride |
                            args.k_head_stride |                                                                //
                            args.v_batch_stride | args.v_token_stride | args.v_head_stride |                    //
                            args.k_cache_block_stride | args.k_cache_token_stride | args.k_cache_head_stride |  //
                            args.v_cache_block_stride | args.v_cache_token_stride | args.v_cache_head_stride;
  return distances % kFullWidth<T> == 0 && args.k_cache_dim_stride == 1 && args.v_cache_dim_stride == 1 &&
         aligned(args.k, args.v, args.k_cache, args.v_cache, args.cos, args.sin);
}

template <int kWidth, bool kInterleaved, class T>
void start(const AppendKV& args, const Grid& grid, void* stream) {
  constexpr int kCodes = kWidth < 4 ? kWidth : 4;  // wider ones spill, around the calls that divisions are
  launch("append_kv", grid, stream,
         args.int8 ? append_kv_kernel<kCodes, kInterleaved, T, int8_t> : append_kv_kernel<kWidth, kInterleaved, T, T>,
         args);
}

}  // namespace

void append_kv(const AppendKV& args, void* stream) {
  if (args.batch == 0 || args.tokens == 0 || args.heads == 0) return;
  const Grid grid{dim3(unsigned(args.tokens), unsigned(std::min(args.batch, kMaxGridRows))),
                  dim3(kWarp, unsigned(std::min<int64_t>(2 * args.heads, kMaxWarps)))};
  with_type(args.dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int kWidth = kFullWidth<T>;
    if (takes_vectors<T>(args))
      args.interleaved ? start<kWidth, true, T>(args, grid, stream) : start<kWidth, false, T>(args, grid, stream);
    else
      args.interleaved ? start<1, true, T>(args, grid, stream) : start<1, false, T>(args, grid, stream);
  });
}

}  // namespace llmsys::cuda
