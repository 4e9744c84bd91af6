// What optimizers with at most one state do to each element of a list of tensors: read p, the gradient and the state,
// update, write p and the state.
#pragma once

#include "simd.h"
#include "tensor_list.h"

namespace llmsys::cpu::LLMSYS_ISA {

// Elements [begin, end) of `tensor`: update(gradient, p, state) on vectors; without a `state` it is zero, and dropped.
template <class P, class G, class Tensor, class Update>
LLMSYS_INLINE void update_elements(const Tensor& tensor, float* state, int64_t begin, int64_t end, Update update) {
  P* param = static_cast<P*>(tensor.param) + begin;
  const G* grad = static_cast<const G*>(tensor.grad) + begin;
  float* master = tensor.master ? tensor.master + begin : nullptr;
  if (state) state += begin;
  for_each_pair(
      end - begin,
      [&](int64_t d) {
        F32 p[2], s[2] = {};
        for (int i = 0; i < 2; ++i) {
          const int64_t at = d + i * kLanes;
          p[i] = master ? load(master + at) : load(param + at);
          if (state) s[i] = load(state + at);
          update(load(grad + at), p[i], s[i]);
        }
        if (state) store_pair<false>(state + d, s[0], s[1]);
        if (master) store_pair<false>(master + d, p[0], p[1]);
        store_pair<false>(param + d, p[0], p[1]);
      },
      [&](int64_t d, int count) {
        F32 p = master ? load(master + d, count) : load(param + d, count), s = {};
        if (state) s = load(state + d, count);
        update(load(grad + d, count), p, s);
        if (state) store(state + d, s, count);
        if (master) store(master + d, p, count);
        store(param + d, p, count);
      });
}

// Calls body(P{}, G{}, tensor, begin, end) over the whole list, in parallel.
template <class Args, class Tensor, class Body>
LLMSYS_INLINE void for_each_tensor(const Args& args, const Tensor* tensors, Body body) {
  // Whole cache lines of every element type, so that no two threads write to one.
  constexpr int64_t kUnit = 64, kUnitBytes = kUnit * 5 * sizeof(float);
  const TensorList<Tensor> list(tensors, args.num_tensors, kUnit);
  with_type(args.param_dtype, [&](auto param) {
    with_type(args.grad_dtype, [&](auto grad) {
      list.for_each_run(grain_of(kUnitBytes), [&](const Tensor& tensor, int64_t begin, int64_t end, int64_t) {
        body(param, grad, tensor, begin, end);
      });
    });
  });
}

}  // namespace llmsys::cpu::LLMSYS_ISA
