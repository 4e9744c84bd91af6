#include "../adamw.h"

#include "adamw_update.h"
#include "dispatch.h"
#include "simd.h"
#include "tensor_list.h"

namespace llmsys::cpu::LLMSYS_ISA {
namespace {

template <bool kFromGrad, class P, class G>
void update_run(const AdamWShared& shared, const AdamWTensor& t, int64_t begin, int64_t end) {
  P* param = static_cast<P*>(t.param) + begin;
  const G* grad = static_cast<const G*>(t.grad) + begin;
  float *exp_avg = t.exp_avg + begin, *exp_avg_sq = t.exp_avg_sq + begin;
  float* master = t.master ? t.master + begin : nullptr;
  for_each_pair(
      end - begin,
      [&](int64_t d) {
        F32 p[2], m[2], v[2];
        for (int i = 0; i < 2; ++i) {
          const int64_t at = d + i * kLanes;
          p[i] = master ? load(master + at) : load(param + at);
          m[i] = load(exp_avg + at);
          v[i] = load(exp_avg_sq + at);
          adamw_update<kFromGrad>(shared, load(grad + at), p[i], m[i], v[i]);
        }
        store_pair<false>(exp_avg + d, m[0], m[1]);
        store_pair<false>(exp_avg_sq + d, v[0], v[1]);
        if (master) store_pair<false>(master + d, p[0], p[1]);
        store_pair<false>(param + d, p[0], p[1]);
      },
      [&](int64_t d, int count) {
        F32 p = master ? load(master + d, count) : load(param + d, count);
        F32 m = load(exp_avg + d, count), v = load(exp_avg_sq + d, count);
        adamw_update<kFromGrad>(shared, load(grad + d, count), p, m, v);
        store(exp_avg + d, m, count);
        store(exp_avg_sq + d, v, count);
        if (master) store(master + d, p, count);
        store(param + d, p, count);
      });
}

}  // namespace

void adamw(const AdamW& args) {
  // Whole cache lines of every element type, so that no two threads write to one.
  constexpr int64_t kUnit = 64, kUnitBytes = kUnit * 7 * sizeof(float);
  const TensorList<AdamWTensor> list(args.tensors, args.num_tensors, kUnit);
  const AdamWShared shared(args);
  with_type(args.param_dtype, [&](auto param) {
    with_type(args.grad_dtype, [&](auto grad) {
      list.for_each_run(grain_of(kUnitBytes), [&](const AdamWTensor& tensor, int64_t begin, int64_t end, int64_t) {
        auto* run = shared.from_grad ? update_run<true, decltype(param), decltype(grad)>
                                     : update_run<false, decltype(param), decltype(grad)>;
        run(shared, tensor, begin, end);
      });
    });
  });
}

}  // namespace llmsys::cpu::LLMSYS_ISA

LLMSYS_DISPATCH(adamw, AdamW)
