#include "../lamb.h"

#include "adamw_update.h"
#include "dispatch.h"
#include "list_update.h"

namespace llmsys::cpu::LLMSYS_ISA {
namespace {

constexpr int64_t kChunk = 4096;  // elements whose sums of squares are added up apart, so that threads do not matter

// Adam's step of size 1: its direction, to which weight_decay * p is added.
AdamWShared unit_step(Lamb args) {
  args.lr = 1.0;
  return AdamWShared(args);
}

struct Direction {
  const AdamWShared shared;
  const float weight_decay;

  explicit Direction(const Lamb& args) : shared(unit_step(args)), weight_decay(float(args.weight_decay)) {}

  LLMSYS_INLINE F32 operator()(F32 p, F32 m, F32 v) const {
    return multiply_add(p, weight_decay, shared.step_size * m / (sqrt(v) + shared.eps));
  }
};

struct Squares {
  double weights, direction;
};

// Moments of `size` elements from `at` on; the squares of their weights and of the direction, added up.
template <bool kFromGrad, class P, class G>
Squares update_chunk(const Direction& direction, const LambTensor& tensor, int64_t at, int64_t size) {
  const P* param = static_cast<const P*>(tensor.param) + at;
  const G* grad = static_cast<const G*>(tensor.grad) + at;
  const float* master = tensor.master ? tensor.master + at : nullptr;
  float *exp_avg = tensor.exp_avg + at, *exp_avg_sq = tensor.exp_avg_sq + at;
  auto weights = [&](int64_t d, int count) {
    return master ? load_some(master + d, count) : load_some(param + d, count);
  };
  auto new_direction = [&](int64_t d, int count) {
    F32 m = load_some(exp_avg + d, count), v = load_some(exp_avg_sq + d, count);
    update_moments<kFromGrad>(direction.shared, load_some(grad + d, count), m, v);
    store_some(exp_avg + d, m, count);
    store_some(exp_avg_sq + d, v, count);
    return first_lanes(count, direction(weights(d, count), m, v), 0.0f);  // 0 / 0 where eps is 0
  };
  auto squares_of = [&](auto value) {
    auto add = [&](int64_t d, int count, F32 sum) {
      const F32 x = value(d, count);
      return multiply_add(x, x, sum);
    };
    return sum_over(
        size,
        [&](int64_t d, Block sum) { return Block{add(d, kLanes, sum.first), add(d + kLanes, kLanes, sum.second)}; },
        [&](int64_t d, int count) { return add(d, count, F32{}); });
  };
  return {squares_of(weights), squares_of(new_direction)};
}

// lr * |p| / |u| of each tensor; the moments are updated on the way.
template <bool kFromGrad>
void find_steps(const Lamb& args, const Direction& direction, float* steps) {
  const TensorList<LambTensor> list(args.tensors, args.num_tensors, kChunk);
  const Scratch<Squares> squares(list.units());
  with_type(args.param_dtype, [&](auto p) {
    with_type(args.grad_dtype, [&](auto g) {
      list.for_each_run(grain_of(kChunk * 7 * sizeof(float)),
                        [&](const LambTensor& tensor, int64_t begin, int64_t end, int64_t chunk) {
                          for (int64_t at = begin; at < end; at += kChunk)
                            squares[chunk++] = update_chunk<kFromGrad, decltype(p), decltype(g)>(
                                direction, tensor, at, smaller(end - at, kChunk));
                        });
    });
  });
  for (int64_t t = 0, chunk = 0; t < args.num_tensors; ++t) {
    Squares sum = {};
    for (int64_t at = 0; at < args.tensors[t].numel; at += kChunk, ++chunk) {
      sum.weights += squares[chunk].weights;
      sum.direction += squares[chunk].direction;
    }
    const bool none = sum.weights == 0 || sum.direction == 0;
    steps[t] = float(none ? args.lr : args.lr * __builtin_sqrt(sum.weights) / __builtin_sqrt(sum.direction));
  }
}

}  // namespace

void lamb(const Lamb& args) {
  const Direction direction(args);
  const Scratch<float> steps(args.num_tensors);
  direction.shared.from_grad ? find_steps<true>(args, direction, steps.data)
                             : find_steps<false>(args, direction, steps.data);
  for_each_tensor<2>(args, args.tensors, [&](auto p, auto g, const auto& rounding, const auto& tensor, const Run& run) {
    const float step = steps[&tensor - args.tensors];
    update_elements<decltype(p), decltype(g), false>(
        tensor, {tensor.exp_avg, tensor.exp_avg_sq}, run, rounding, [&](F32, F32& weights, F32(&states)[2]) {
          weights = multiply_add(direction(weights, states[0], states[1]), -step, weights);
        });
  });
}

}  // namespace llmsys::cpu::LLMSYS_ISA

LLMSYS_DISPATCH(lamb, Lamb)
