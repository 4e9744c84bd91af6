#include "../grad_norm.h"

#include <cmath>

#include "dispatch.h"
#include "simd.h"
#include "tensor_list.h"

namespace llmsys::cpu::LLMSYS_ISA {
namespace {

template <class T>
float sum_of_squares(const T* x, int64_t size) {
  // Four sums, since an addition takes four cycles and two can start in each.
  F32 sums[4] = {};
  int64_t d = 0;
  for (; d + 4 * kLanes <= size; d += 4 * kLanes)
    for (int i = 0; i < 4; ++i) {
      F32 value = load(x + d + i * kLanes);
      sums[i] = sums[i] + value * value;
    }
  for (; d < size; d += kLanes) {
    F32 value = load(x + d, size - d < kLanes ? int(size - d) : kLanes);
    sums[0] = sums[0] + value * value;
  }
  return reduce_add((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

}  // namespace

void grad_norm(const GradNorm& args) {
  constexpr int64_t kChunkBytes = kGradNormChunk * sizeof(float);
  const TensorList<GradNormTensor> list(args.tensors, args.num_tensors, kGradNormChunk);
  const Scratch<float> sums(list.units());
  list.for_each_run(grain_of(kChunkBytes), [&](const GradNormTensor& tensor, int64_t begin, int64_t end, int64_t chunk) {
    with_type(tensor.dtype, [&](auto element) {
      const auto* data = static_cast<const decltype(element)*>(tensor.data);
      for (int64_t at = begin; at < end; at += kGradNormChunk)
        sums[chunk++] = sum_of_squares(data + at, end - at < kGradNormChunk ? end - at : kGradNormChunk);
    });
  });
  double total = 0;
  for (int64_t i = 0; i < list.units(); ++i) total += sums[i];
  *args.norm = float(std::sqrt(total));
}

}  // namespace llmsys::cpu::LLMSYS_ISA

LLMSYS_DISPATCH(grad_norm, GradNorm)
