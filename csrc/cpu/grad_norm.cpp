#include "../grad_norm.h"

#include "dispatch.h"
#include "simd.h"
#include "tensor_list.h"

namespace llmsys::cpu::LLMSYS_ISA {
namespace {

template <class T>
double sum_of_squares(const T* x, int64_t size) {
  return sum_over(
      size,
      [&](int64_t d, Block sum) {
        Block v = load_block<order_of<T>>(x + d);
        return Block{multiply_add(v.first, v.first, sum.first), multiply_add(v.second, v.second, sum.second)};
      },
      [&](int64_t d, int count) { return load(x + d, count) * load(x + d, count); });
}

}  // namespace

void grad_norm(const GradNorm& args) {
  constexpr int64_t kChunkBytes = kGradNormChunk * sizeof(float);
  const TensorList<GradNormTensor> list(args.tensors, args.num_tensors, kGradNormChunk);
  const Scratch<double> sums(list.units());
  list.for_each_run(grain_of(kChunkBytes),
                    [&](const GradNormTensor& tensor, int64_t begin, int64_t end, int64_t chunk) {
                      with_type(tensor.dtype, [&](auto element) {
                        const auto* data = static_cast<const decltype(element)*>(tensor.data);
                        for (int64_t at = begin; at < end; at += kGradNormChunk)
                          sums[chunk++] = sum_of_squares(data + at, smaller(end - at, kGradNormChunk));
                      });
                    });
  double total = 0;
  for (int64_t i = 0; i < list.units(); ++i) total += sums[i];
  *args.norm = float(__builtin_sqrt(total));
}

}  // namespace llmsys::cpu::LLMSYS_ISA

LLMSYS_DISPATCH(grad_norm, GradNorm)
