#include "../adamw.h"

#include "adamw_update.h"
#include "dispatch.h"
#include "list_update.h"

namespace llmsys::cpu::LLMSYS_ISA {
namespace {

template <bool kFromGrad>
void run(const AdamW& args) {
  const AdamWShared shared(args);
  auto update = [&](F32 grad, F32& p, F32(&states)[2]) {
    adamw_update<kFromGrad>(shared, grad, p, states[0], states[1]);
  };
  for_each_tensor<2>(args, args.tensors, [&](auto p, auto g, const auto& rounding, const auto& tensor, const Run& run) {
    update_elements<decltype(p), decltype(g)>(tensor, {tensor.exp_avg, tensor.exp_avg_sq}, run, rounding, update);
  });
}

}  // namespace

void adamw(const AdamW& args) { args.beta1 <= 0.5 ? run<true>(args) : run<false>(args); }

}  // namespace llmsys::cpu::LLMSYS_ISA

LLMSYS_DISPATCH(adamw, AdamW)
