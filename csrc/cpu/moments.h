// The mean and the variance of a row, and the row without them.
#pragma once

#include "norm.h"
#include "simd.h"

namespace llmsys::cpu::LLMSYS_ISA {

// The first `count` lanes of `value`, and zeros.
LLMSYS_INLINE F32 keep(F32 value, int count) {
  float lanes[kLanes];
  store(lanes, value);
  return load(lanes, count);
}

typedef double F64 __attribute__((vector_size(2 * LLMSYS_VECTOR_BYTES)));  // as many lanes as F32

// Several sums over [0, size) at once, as sum_over: add(offset, blocks) adds to kSums of them, tail(offset, count,
// vectors) fills as many. Runs are added up in double; short sums have runs of one block, as where every row is like
// the others an error of one is the error of all.
template <int kSums, class Add, class Tail>
LLMSYS_INLINE void sums_over(int64_t size, double* sums, Add add, Tail tail) {
  constexpr int64_t kBlock = 2 * kLanes, kRun = 16 * kBlock;
  const int64_t length = size <= kRun ? kBlock : kRun;
  auto widened = [](F32 v) { return __builtin_convertvector(v, F64); };
  F64 totals[kSums] = {};
  int64_t offset = 0;
  for (const int64_t whole = size - size % kBlock; offset < whole;) {
    const int64_t end = whole - offset < length ? whole : offset + length;
    Block run[kSums] = {};
    for (; offset < end; offset += kBlock) add(offset, run);
    for (int i = 0; i < kSums; ++i) totals[i] += widened(run[i].first) + widened(run[i].second);
  }
  for (; offset < size; offset += kLanes) {
    F32 terms[kSums];
    tail(offset, size - offset < kLanes ? int(size - offset) : kLanes, terms);
    for (int i = 0; i < kSums; ++i) totals[i] += widened(terms[i]);
  }
  for (int i = 0; i < kSums; ++i) {
    sums[i] = 0;
    for (int lane = 0; lane < kLanes; ++lane) sums[i] += totals[i][lane];
  }
}

// A weight or a bias: `otherwise` in every column where there is none.
template <class W>
struct Columns {
  const W* values;
  float otherwise;

  template <Order kOrder>
  LLMSYS_INLINE Block block(int64_t d) const {
    return values ? load_block<kOrder>(values + d) : Block{splat(otherwise), splat(otherwise)};
  }
  LLMSYS_INLINE F32 part(int64_t d, int count) const { return values ? load(values + d, count) : splat(otherwise); }
};

// x - mean, with the mean in two parts: what float32 cannot hold of it matters where rows lie far from zero.
struct Centre {
  float mean, rest;

  explicit Centre(double exact) : mean(float(exact)), rest(float(exact - double(mean))) {}
};

// float32 rows are summed as distances from their first element, so that an offset common to all does not eat the
// digits in which they differ; the digits of 16-bit elements are few enough.
template <class T>
double mean_of(const T* x, int64_t dim) {
  const float shift = __is_same(T, float) ? load(x, 1)[0] : 0.0f;
  auto term = [&](F32 v) { return v - shift; };
  auto add = [&](F32 v, F32 sum) { return sum + term(v); };
  const double sum = sum_over(
      dim, [&](int64_t d, Block sum) { return each_half(add, load_block<order_of<T>>(x + d), sum); },
      [&](int64_t d, int count) { return keep(term(load(x + d, count)), count); });
  return double(shift) + sum / double(dim);
}

// mean((x - mean)^2): read again, from the cache, as differences of squares would cancel.
template <class T>
double variance_of(const T* x, int64_t dim, Centre centre) {
  auto add = [&](F32 v, F32 sum) {
    F32 distance = (v - centre.mean) - centre.rest;
    return multiply_add(distance, distance, sum);
  };
  const double sum = sum_over(
      dim, [&](int64_t d, Block sum) { return each_half(add, load_block<order_of<T>>(x + d), sum); },
      [&](int64_t d, int count) { return keep(add(load(x + d, count), F32{}), count); });
  return sum / double(dim);
}

// y = (s - mean) * rstd * weight + bias of one row, or of a part of one; fetches `next` meanwhile.
template <bool kStream, class T, class W>
void normalise_row(const T* s, T* y, int64_t dim, Centre centre, float rstd, Columns<W> weight, Columns<W> bias,
                   const T* next) {
  constexpr Order kOrder = order_of<T>;
  const float shift = -centre.rest * rstd;
  auto normalised = [&](F32 v, F32 w, F32 b) { return multiply_add(multiply_add(v - centre.mean, rstd, shift), w, b); };
  for_each_pair(
      dim,
      [&](int64_t d) {
        prefetch(next + d);
        store_block<kOrder, kStream>(y + d,
                                     each_half(normalised, load_block<kOrder>(s + d), weight.template block<kOrder>(d),
                                               bias.template block<kOrder>(d)));
      },
      [&](int64_t d, int count) {
        store(y + d, normalised(load(s + d, count), weight.part(d, count), bias.part(d, count)), count);
      });
}

}  // namespace llmsys::cpu::LLMSYS_ISA
