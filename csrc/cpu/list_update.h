// What optimizers do to each element of a list of tensors: read p, the gradient and the states, update, write p and the
// states.
#pragma once

#include "philox.h"
#include "simd.h"
#include "tensor_list.h"

namespace llmsys::cpu::LLMSYS_ISA {

// How a parameter is written: as the nearest number of its type.
struct Nearest {
  template <class P>
  LLMSYS_INLINE void store_both(P* p, uint64_t, F32 low, F32 high) const {
    store_pair<false>(p, low, high);
  }
  template <class P>
  LLMSYS_INLINE void store_first(P* p, uint64_t, F32 value, int count) const {
    store(p, value, count);
  }
};

// As one of the two nearest bfloat16, the farther one the less likely, so that the mean is the number itself. Element i
// takes the upper half of word i of `seed`.
class Stochastic {
 public:
  explicit Stochastic(uint64_t seed) : keys_(seed) {}

  LLMSYS_INLINE void store_both(bfloat16* p, uint64_t element, F32 low, F32 high) const {
    const Words words = philox(keys_, element / 4);
    store_vector<false>(p, narrow_pair(rounded(low, words.low), rounded(high, words.high)));
  }
  LLMSYS_INLINE void store_first(bfloat16* p, uint64_t element, F32 value, int count) const {
    store(p, as_f32(rounded(value, philox(keys_, element / 4).low) << 16), count);
  }

 private:
  // Adding could carry a NaN into infinity, so make it quiet instead.
  static LLMSYS_INLINE U32 rounded(F32 value, U32 words) {
    const U32 bits = as_u32(value);
    return select(value == value, bits + (words >> 16), bits | 0x400000u) >> 16;
  }

  PhiloxKeys keys_;
};

// Elements [begin, end) of a tensor, the first of which is `element` of its list.
struct Run {
  int64_t begin, end;
  uint64_t element;
};

// update(gradient, p, states) on vectors. A state that is null is zero, and dropped.
template <class P, class G, bool kWriteStates = true, int kStates, class Tensor, class Rounding, class Update>
LLMSYS_INLINE void update_elements(const Tensor& tensor, float* const (&states)[kStates], const Run& run,
                                   const Rounding& rounding, Update update) {
  P* param = static_cast<P*>(tensor.param) + run.begin;
  const G* grad = static_cast<const G*>(tensor.grad) + run.begin;
  float* master = tensor.master ? tensor.master + run.begin : nullptr;
  float* state[kStates];
  for (int k = 0; k < kStates; ++k) state[k] = states[k] ? states[k] + run.begin : nullptr;
  struct Vectors {
    F32 p, states[kStates] = {};
  };
  auto updated = [&](int64_t at, auto load_here) {
    Vectors v;
    v.p = master ? load_here(master + at) : load_here(param + at);
    for (int k = 0; k < kStates; ++k)
      if (state[k]) v.states[k] = load_here(state[k] + at);
    update(load_here(grad + at), v.p, v.states);
    return v;
  };
  for_each_pair(
      run.end - run.begin,
      [&](int64_t d) {
        auto whole = [](const auto* from) { return load(from); };
        const Vectors low = updated(d, whole), high = updated(d + kLanes, whole);
        for (int k = 0; k < kStates; ++k)
          if (kWriteStates && state[k]) store_pair<false>(state[k] + d, low.states[k], high.states[k]);
        if (master) store_pair<false>(master + d, low.p, high.p);
        rounding.store_both(param + d, run.element + d, low.p, high.p);
      },
      [&](int64_t d, int count) {
        const Vectors v = updated(d, [=](const auto* from) { return load(from, count); });
        for (int k = 0; k < kStates; ++k)
          if (kWriteStates && state[k]) store(state[k] + d, v.states[k], count);
        if (master) store(master + d, v.p, count);
        rounding.store_first(param + d, run.element + d, v.p, count);
      });
}

// Calls body(P{}, G{}, rounding, tensor, run) over the whole list, in parallel.
template <int kStates, class Args, class Tensor, class Body>
LLMSYS_INLINE void for_each_tensor(const Args& args, const Tensor* tensors, Body body) {
  // Whole cache lines of every element type, so that no two threads write to one. llmsys/ops/_stochastic.py counts the
  // elements of a list in the same units.
  constexpr int64_t kUnit = 64, kUnitBytes = kUnit * (3 + 2 * kStates) * sizeof(float);
  const TensorList<Tensor> list(tensors, args.num_tensors, kUnit);
  with_type(args.param_dtype, [&](auto param) {
    with_type(args.grad_dtype, [&](auto grad) {
      auto update_all = [&](const auto& rounding) {
        list.for_each_run(grain_of(kUnitBytes), [&](const Tensor& tensor, int64_t begin, int64_t end, int64_t unit) {
          body(param, grad, rounding, tensor, Run{begin, end, uint64_t(unit * kUnit)});
        });
      };
      if constexpr (__is_same(decltype(param), bfloat16))
        if (args.stochastic) return update_all(Stochastic(args.seed));
      update_all(Nearest{});
    });
  });
}

}  // namespace llmsys::cpu::LLMSYS_ISA
