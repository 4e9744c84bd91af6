#include "../group_norm.h"

#include "dispatch.h"
#include "moments.h"
#include "norm.h"
#include "stream.h"

namespace llmsys::cpu::LLMSYS_ISA {
namespace {

// One channel's weight or bias, in every element.
template <class W>
Columns<W> channel_of(const void* values, int64_t channel, float otherwise) {
  const W* at = static_cast<const W*>(values);
  return {nullptr, at ? load(at + channel, 1)[0] : otherwise};
}

template <bool kStream, class T, class W>
void forward(const GroupNormForward& args) {
  const int64_t size = args.size, channels = args.channels / args.groups;
  parallel_for(args.samples * args.groups, grain_of(2 * channels * size * sizeof(T)), [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) {
      const int64_t first = group * channels * size;
      const T* x = static_cast<const T*>(args.x) + first;
      T* y = static_cast<T*>(args.y) + first;
      const Centre centre(mean_of(x, channels * size));
      const float rstd = float(1.0 / __builtin_sqrt(variance_of(x, channels * size, centre) + double(args.eps)));
      if (args.mean) args.mean[group] = centre.mean, args.rstd[group] = rstd;
      for (int64_t c = 0; c < channels; ++c) {
        const int64_t channel = group % args.groups * channels + c;
        normalise_row<kStream>(x + c * size, y + c * size, size, centre, rstd,
                               channel_of<W>(args.weight, channel, 1.0f), channel_of<W>(args.bias, channel, 0.0f),
                               x + c * size);
      }
    }
    if (kStream) stream_fence();
  });
}

// A channel's sums of dy * xhat and of dy: what it gives to dweight and dbias.
template <class T>
void channel_sums(const T* dy, const T* x, int64_t size, float mean, float rstd, double* dweight, double* dbias) {
  constexpr Order kOrder = order_of<T>;
  auto xhat_of = [&](F32 v) { return (v - mean) * rstd; };
  double sums[2];
  sums_over<2>(
      size, sums,
      [&](int64_t s, Block* sums) {
        Block g = load_block<kOrder>(dy + s), xhat = each_half(xhat_of, load_block<kOrder>(x + s));
        sums[0] = {sums[0].first + g.first, sums[0].second + g.second};
        sums[1] = {multiply_add(g.first, xhat.first, sums[1].first),
                   multiply_add(g.second, xhat.second, sums[1].second)};
      },
      [&](int64_t s, int count, F32* terms) {
        terms[0] = load(dy + s, count);  // zero beyond `count`
        terms[1] = terms[0] * xhat_of(load(x + s, count));
      });
  *dweight = sums[1];
  *dbias = sums[0];
}

// dx = rstd * (dy * w - mean(dy * w) - xhat * mean(dy * w * xhat)), means over the group.
template <bool kStream, class T, class W>
void backward_group(const GroupNormBackward& args, int64_t group) {
  constexpr Order kOrder = order_of<T>;
  const int64_t size = args.size, channels = args.channels / args.groups, first = group * channels * size;
  const T* dy = static_cast<const T*>(args.dy) + first;
  const T* x = static_cast<const T*>(args.x) + first;
  T* dx = static_cast<T*>(args.dx) + first;
  const float mean = args.mean[group], rstd = args.rstd[group];
  double level = 0, along = 0;
  for (int64_t c = 0; c < channels; ++c) {
    const int64_t channel = group % args.groups * channels + c;
    double* dweight = args.dweight_parts + group * channels + c;
    double* dbias = args.dbias_parts + group * channels + c;
    channel_sums(dy + c * size, x + c * size, size, mean, rstd, dweight, dbias);
    const double w = channel_of<W>(args.weight, channel, 1.0f).otherwise;
    level += w * *dbias;
    along += w * *dweight;
  }
  // A group of one element is its own mean: what rounding leaves of its gradient is no gradient.
  const float scale = channels * size == 1 ? 0.0f : rstd;
  const float mean_gradient = float(level / double(channels * size));
  const float mean_projection = float(along / double(channels * size));
  for (int64_t c = 0; c < channels; ++c) {
    const float w = channel_of<W>(args.weight, group % args.groups * channels + c, 1.0f).otherwise;
    auto gradient = [&](F32 g, F32 v) { return (g * w - mean_gradient - (v - mean) * rstd * mean_projection) * scale; };
    const int64_t at = c * size;
    for_each_pair(
        size,
        [&](int64_t s) {
          store_block<kOrder, kStream>(
              dx + at + s, each_half(gradient, load_block<kOrder>(dy + at + s), load_block<kOrder>(x + at + s)));
        },
        [&](int64_t s, int count) {
          store(dx + at + s, gradient(load(dy + at + s, count), load(x + at + s, count)), count);
        });
  }
}

// A parameter's gradient, the sum over the samples of `parts`; nothing where it has none.
template <class W>
void sum_samples(const GroupNormBackward& args, const double* parts, W* gradient) {
  if (!gradient) return;
  parallel_for(args.channels, grain_of(args.samples * sizeof(double)), [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      double sum = 0;
      for (int64_t sample = 0; sample < args.samples; ++sample) sum += parts[sample * args.channels + c];
      store(gradient + c, splat(float(sum)), 1);
    }
  });
}

template <bool kStream, class T, class W>
void backward(const GroupNormBackward& args) {
  const int64_t group_bytes = args.channels / args.groups * args.size * int64_t(sizeof(T));
  parallel_for(args.samples * args.groups, grain_of(3 * group_bytes), [&](int64_t begin, int64_t end) {
    for (int64_t group = begin; group < end; ++group) backward_group<kStream, T, W>(args, group);
    if (kStream) stream_fence();
  });
  sum_samples(args, args.dweight_parts, static_cast<W*>(args.dweight));
  sum_samples(args, args.dbias_parts, static_cast<W*>(args.dbias));
}

}  // namespace

void group_norm_forward(const GroupNormForward& args) {
  with_types(args.dtype, args.weight_dtype, [&](auto x, auto weight) {
    using T = decltype(x);
    using W = decltype(weight);
    worth_streaming<T>(args.samples * args.channels, args.size, args.y) ? forward<true, T, W>(args)
                                                                        : forward<false, T, W>(args);
  });
}

void group_norm_backward(const GroupNormBackward& args) {
  with_types(args.dtype, args.weight_dtype, [&](auto x, auto weight) {
    using T = decltype(x);
    using W = decltype(weight);
    worth_streaming<T>(args.samples * args.channels, args.size, args.dx) ? backward<true, T, W>(args)
                                                                         : backward<false, T, W>(args);
  });
}

}  // namespace llmsys::cpu::LLMSYS_ISA

LLMSYS_DISPATCH(group_norm_forward, GroupNormForward)
LLMSYS_DISPATCH(group_norm_backward, GroupNormBackward)
