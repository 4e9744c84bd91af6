#include "../cross_entropy.h"

#include "dispatch.h"
#include "functions.h"
#include "parallel.h"
#include "stream.h"

namespace llmsys::cpu::LLMSYS_ISA {
namespace {

constexpr float kLog2E = 1.44269504f;
constexpr double kWideLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;

// e^z / 2^c as mantissa · 2^n, for a whole number c near the largest z in powers of two: one product in two uses, and
// no test for overflow. Where the quotient is below 2^-126 the scale is 0 exactly, at -infinity too; NaN stays.
class ScaledExp {
 public:
  static constexpr float kMaxShift = 65536.0f;  // |c| up to here keeps every sum below a whole number of float32

  explicit ScaledExp(float c)
      : magic_(splat(kRound + 127.0f - c)), lowest_(splat((c - 127.0f) / kLog2E)), highest_(splat(0.0f)) {}

  struct Parts {
    F32 mantissa, scale;
  };

  LLMSYS_INLINE Parts operator()(F32 z) {
    z = max(lowest_, z);
    F32 biased = multiply_add(z, kLog2E, magic_);  // n + 127 in the low bits, which are the exponent of 2^n
    highest_ = max(highest_, biased);
    F32 f = multiply_add(z, kLog2E, magic_ - biased);  // in [-1/2, 1/2]
    // Minimax polynomial of 2^f with p(0) = 1, of relative error 9.2e-8.
    F32 p = splat(1.326472731e-3f);
    p = multiply_add(p, f, 9.671512991e-3f);
    p = multiply_add(p, f, 5.550733581e-2f);
    p = multiply_add(p, f, 2.402224243e-1f);
    p = multiply_add(p, f, 6.931470037e-1f);
    p = multiply_add(p, f, 1.0f);
    return {p, as_f32(as_u32(biased) << 23)};
  }

  // The largest n so far.
  float highest() const { return max_lane(highest_) - (kRound + 127.0f); }

 private:
  static constexpr float kRound = 12582912.0f;  // 1.5 · 2^23: a sum with it is a whole number
  F32 magic_, lowest_, highest_;
};

// A row of logits, read as z.
template <class T, bool kCapped>
struct Row {
  const T* x;
  int64_t size;
  float softcap;

  LLMSYS_INLINE F32 z(F32 x) const {
    if constexpr (kCapped) return softcap * tanh(x / softcap);
    return x;
  }
  // dz / dx
  LLMSYS_INLINE F32 slope(F32 z) const { return 1.0f - (z / softcap) * (z / softcap); }

  double z_at(int64_t i) const {
    const double x_i = load(x + i, 1)[0];
    return kCapped ? double(softcap) * __builtin_tanh(x_i / softcap) : x_i;
  }
  double slope_at(double z) const { return kCapped ? 1.0 - (z / softcap) * (z / softcap) : 1.0; }
};

// ---- log of the sum of exponentials ----

constexpr int64_t kBlock = 1024;  // elements that a core's first cache holds twice over

// A whole number near the row's largest z within [begin, end), in powers of two.
template <class T, bool kCapped>
float shift_of(const Row<T, kCapped>& row, int64_t begin, int64_t end) {
  const float z = row.z(splat(max_over(row.x + begin, end - begin)))[0] * kLog2E;
  return z < -60000.0f ? -60000.0f : __builtin_rintf(z);
}

struct BlockSum {
  double sum;  // of e^z / 2^c
  float highest;
};

template <class T, bool kCapped>
BlockSum sum_block(const Row<T, kCapped>& row, int64_t begin, int64_t end, float c) {
  ScaledExp exp(c);
  F32 even = {}, odd = {};
  for_each_pair(
      end - begin,
      [&](int64_t d) {
        Block x = load_block<order_of<T>>(row.x + begin + d);
        auto first = exp(row.z(x.first)), second = exp(row.z(x.second));
        even = multiply_add(first.mantissa, first.scale, even);
        odd = multiply_add(second.mantissa, second.scale, odd);
      },
      [&](int64_t d, int count) {
        F32 z = first_lanes(count, row.z(load(row.x + begin + d, count)), -kInfinity);
        auto last = exp(z);
        even = multiply_add(last.mantissa, last.scale, even);
      });
  F32 both = even + odd;
  double sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += both[i];
  return {sum, exp.highest()};
}

// For rows with NaN or infinity, or numbers too large for ScaledExp, and short ones, whose sum shows the last bit of
// e^z.
template <class T, bool kCapped>
__attribute__((noinline)) double log_sum_exp_anywhere(const Row<T, kCapped>& row) {
  double highest = -__builtin_inf(), sum = 0;
  for (int64_t i = 0; i < row.size; ++i) {
    const double z = row.z_at(i);
    if (z != z) return z;
    if (z > highest) highest = z;
  }
  if (__builtin_isinf(highest)) return highest;
  for (int64_t i = 0; i < row.size; ++i) sum += __builtin_exp(row.z_at(i) - highest);
  return highest + __builtin_log(sum);
}

// The order of the sum depends on the row's size and the vector's width alone.
template <class T, bool kCapped>
double log_sum_exp(const Row<T, kCapped>& row) {
  if (row.size < 16) return log_sum_exp_anywhere(row);
  double total = 0;
  float c = shift_of(row, 0, row.size < kBlock ? row.size : kBlock);
  for (int64_t begin = 0; begin < row.size; begin += kBlock) {
    const int64_t end = row.size - begin < kBlock ? row.size : begin + kBlock;
    if (!(__builtin_fabsf(c) < ScaledExp::kMaxShift)) return log_sum_exp_anywhere(row);
    BlockSum block = sum_block(row, begin, end, c);
    if (block.highest > 64.0f) {  // far beyond the first block's largest: once more, around the new largest
      const float higher = shift_of(row, begin, end);
      if (!(__builtin_fabsf(higher) < ScaledExp::kMaxShift)) return log_sum_exp_anywhere(row);
      total *= __builtin_exp2(double(c) - double(higher));
      c = higher;
      block = sum_block(row, begin, end, c);
    }
    total += block.sum;
  }
  if (!(total > 0 && total < __builtin_inf())) return log_sum_exp_anywhere(row);
  return (double(c) + __builtin_log2(total)) * kLn2;
}

// ---- loss ----

// What a call has in common for all rows.
struct Call {
  const float* weight;
  int64_t classes, ignore_index;
  double smoothing, z_loss, total_weight;

  template <class Args>
  explicit Call(const Args& args)
      : weight(args.weight),
        classes(args.classes),
        ignore_index(args.ignore_index),
        smoothing(args.label_smoothing),
        z_loss(args.z_loss),
        total_weight(double(args.classes)) {
    if (weight && smoothing != 0) {
      total_weight = 0;
      for (int64_t c = 0; c < classes; ++c) total_weight += weight[c];
    }
  }

  bool in_range(int64_t target) const { return target >= 0 && target < classes; }
  double weight_of(int64_t target) const { return weight ? double(weight[target]) : 1.0; }
};

template <class T, bool kCapped>
double sum_of_z(const Row<T, kCapped>& row, const float* weight) {
  constexpr Order kOrder = order_of<T>;
  return sum_over(
      row.size,
      [&](int64_t d, Block sum) {
        Block x = load_block<kOrder>(row.x + d), w = {splat(1.0f), splat(1.0f)};
        if (weight) w = load_block<kOrder>(weight + d);
        return Block{multiply_add(row.z(x.first), w.first, sum.first),
                     multiply_add(row.z(x.second), w.second, sum.second)};
      },
      [&](int64_t d, int count) {
        F32 z = row.z(load(row.x + d, count));
        return weight ? z * load(weight + d, count) : z;
      });
}

template <class T, bool kCapped>
double loss_of(const Row<T, kCapped>& row, const Call& call, int64_t target, double lse) {
  if (!call.in_range(target)) return __builtin_nan("");
  double loss = (1 - call.smoothing) * (lse - row.z_at(target));
  if (call.z_loss != 0) loss += call.z_loss * lse * lse;
  loss *= call.weight_of(target);
  if (call.smoothing != 0)
    loss += call.smoothing / double(call.classes) * (lse * call.total_weight - sum_of_z(row, call.weight));
  return loss;
}

// ---- gradient: dz[c] = along · e^(z[c] - lse) - uniform · w[c] - (c == target) · at_target ----

struct Gradient {
  double along, uniform, at_target;

  Gradient(const Call& call, int64_t target, double lse, double dloss, double dlse) {
    const double w = call.in_range(target) ? call.weight_of(target) : __builtin_nan("");
    uniform = dloss * call.smoothing / double(call.classes);
    at_target = dloss * w * (1 - call.smoothing);
    along = at_target + uniform * call.total_weight + dlse;
    if (call.z_loss != 0) along += dloss * w * 2 * call.z_loss * lse;
  }

  template <class R>
  float at(const R& row, const Call& call, int64_t i, int64_t target, double lse) const {
    const double z = row.z_at(i);
    double dz = along * __builtin_exp(z - lse);
    if (call.smoothing != 0) dz -= uniform * call.weight_of(i);
    if (i == target) dz -= at_target;
    return float(dz * row.slope_at(z));
  }
};

template <class T, bool kCapped>
__attribute__((noinline)) void gradient_row_anywhere(const Row<T, kCapped>& row, const Call& call, const Gradient& g,
                                                     int64_t target, double lse, T* dlogits) {
  for (int64_t i = 0; i < row.size; ++i) store(dlogits + i, splat(g.at(row, call, i, target, lse)), 1);
}

template <bool kStream, class T, bool kCapped>
void gradient_row(const Row<T, kCapped>& row, const Call& call, const Gradient& g, int64_t target, double lse,
                  T* dlogits) {
  const double shift = lse * kWideLog2E;
  const float along = float(g.along * __builtin_exp2(__builtin_rint(shift) - shift)), uniform = float(g.uniform);
  const bool finite = __builtin_isfinite(along) && __builtin_isfinite(uniform);
  if (!finite || !(__builtin_fabs(shift) < ScaledExp::kMaxShift - 1))
    return gradient_row_anywhere(row, call, g, target, lse, dlogits);
  ScaledExp exp(float(__builtin_rint(shift)));
  const float at_target = g.at(row, call, target, target, lse);  // before dlogits is written, which may be the logits
  auto gradient = [&](F32 x, F32 uniform_of_class) {
    F32 z = row.z(x);
    auto e = exp(z);
    F32 dz = multiply_add(e.mantissa, e.scale * along, -uniform_of_class);
    if constexpr (kCapped) dz = dz * row.slope(z);
    return dz;
  };
  auto tail = [&](int64_t d, int count) {
    F32 of_class = call.weight ? load(call.weight + d, count) * uniform : splat(uniform);
    store(dlogits + d, gradient(load(row.x + d, count), of_class), count);
  };
  if (call.weight && call.smoothing != 0) {
    auto of_class = [&](int64_t d) { return load(call.weight + d) * uniform; };
    for_each_pair(
        row.size,
        [&](int64_t d) {
          F32 low = gradient(load(row.x + d), of_class(d));
          F32 high = gradient(load(row.x + d + kLanes), of_class(d + kLanes));
          store_pair<kStream>(dlogits + d, low, high);
        },
        tail);
  } else {
    for_each_pair(
        row.size,
        [&](int64_t d) {
          Block x = load_block<order_of<T>>(row.x + d);
          store_block<order_of<T>, kStream>(dlogits + d,
                                            {gradient(x.first, splat(uniform)), gradient(x.second, splat(uniform))});
        },
        tail);
  }
  if (kStream) stream_fence();  // the target's element is written once more, in the ordinary way
  store(dlogits + target, splat(at_target), 1);
}

// ---- calls ----

template <class T>
void zero_row(T* dlogits, int64_t size) {
  memset(static_cast<void*>(dlogits), 0, size * sizeof(T));
}

template <class T, bool kCapped>
void forward(const CrossEntropyForward& args) {
  const Call call(args);
  parallel_for(args.rows, grain_of(4 * args.classes * sizeof(T)), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Row<T, kCapped> row{static_cast<const T*>(args.logits) + i * args.logits_stride, args.classes,
                                args.softcap};
      T* dlogits = args.dlogits ? static_cast<T*>(args.dlogits) + i * args.dlogits_stride : nullptr;
      const int64_t target = args.target[i];
      if (target == args.ignore_index) {
        args.loss[i] = args.lse[i] = 0.0f;
        if (dlogits) zero_row(dlogits, args.classes);
        continue;
      }
      const double lse = log_sum_exp(row);
      args.lse[i] = float(lse);
      args.loss[i] = float(loss_of(row, call, target, lse));
      if (!dlogits) continue;
      const Gradient g(call, target, lse, args.scale ? double(args.scale[i]) : 1.0, 0.0);
      gradient_row<false>(row, call, g, target, lse, dlogits);
    }
  });
}

template <bool kStream, class T, bool kCapped>
void backward(const CrossEntropyBackward& args) {
  const Call call(args);
  parallel_for(args.rows, grain_of(4 * args.classes * sizeof(T)), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const Row<T, kCapped> row{static_cast<const T*>(args.logits) + i * args.logits_stride, args.classes,
                                args.softcap};
      T* dlogits = static_cast<T*>(args.dlogits) + i * args.dlogits_stride;
      const int64_t target = args.target[i];
      if (target == args.ignore_index) {
        zero_row(dlogits, args.classes);
        continue;
      }
      const double lse = args.lse[i];
      const Gradient g(call, target, lse, args.dloss[i], args.dlse ? double(args.dlse[i]) : 0.0);
      gradient_row<kStream>(row, call, g, target, lse, dlogits);
    }
  });
}

}  // namespace

void cross_entropy_forward(const CrossEntropyForward& args) {
  with_type(args.dtype, [&](auto element) {
    using T = decltype(element);
    args.softcap != 0 ? forward<T, true>(args) : forward<T, false>(args);
  });
}

void cross_entropy_backward(const CrossEntropyBackward& args) {
  with_type(args.dtype, [&](auto element) {
    using T = decltype(element);
    const bool apart = args.dlogits != args.logits && args.dlogits_stride == args.classes;
    const bool stream = apart && worth_streaming<T>(args.rows, args.classes, static_cast<T*>(args.dlogits));
    if (args.softcap != 0)
      stream ? backward<true, T, true>(args) : backward<false, T, true>(args);
    else
      stream ? backward<true, T, false>(args) : backward<false, T, false>(args);
  });
}

}  // namespace llmsys::cpu::LLMSYS_ISA

LLMSYS_DISPATCH(cross_entropy_forward, CrossEntropyForward)
LLMSYS_DISPATCH(cross_entropy_backward, CrossEntropyBackward)
