// A function of vectors, applied to every element of equally shaped inputs.
#pragma once

#include <utility>

#include "dispatch.h"
#include "parallel.h"
#include "simd.h"
#include "stream.h"

namespace llmsys::cpu::LLMSYS_ISA {

// A tensor that is read: (rows, dim), rows contiguous inside and `stride` elements apart.
struct Input {
  const void* data;
  int64_t stride;
};

// What a function returns, and where its results go, a contiguous (rows, dim) tensor each.
template <int kSize>
struct Results {
  F32 at[kSize];
};
template <int kSize>
struct Outputs {
  void* at[kSize];
};

// Calls span(row, offset, size) over all elements: runs inside rows, or one long row where every stride allows it.
template <class T, class Span>
void for_each_span(int64_t rows, int64_t dim, bool contiguous, int64_t arrays, Span span) {
  if (contiguous) {
    dim *= rows;
    rows = 1;
  }
  // Runs start on whole vectors, so that aligned arrays stay aligned.
  constexpr int64_t kRun = 4096;
  const int64_t runs = ceil_div(dim, kRun);
  parallel_for(rows * runs, grain_of(arrays * smaller(dim, kRun) * int64_t(sizeof(T))),
               [&](int64_t begin, int64_t end) {
                 for (int64_t i = begin; i < end; ++i) {
                   int64_t offset = i % runs * kRun;
                   span(i / runs, offset, smaller(dim - offset, kRun));
                 }
                 stream_fence();
               });
}

// One run of elements.
template <bool kStream, class T, size_t... kOutput, class Function, class... From>
void pointwise_span(std::index_sequence<kOutput...>, int64_t size, Function function, T* const* to,
                    const From*... from) {
  constexpr Order kOrder = order_of<T>;
  T* const out[] = {to[kOutput]...};  // a copy, which no store can change
  for_each_pair(
      size,
      [&](int64_t d) {
        const auto apply = [&](auto... block) {
          const auto first = function(block.first...), second = function(block.second...);
          (store_block<kOrder, kStream>(out[kOutput] + d, {first.at[kOutput], second.at[kOutput]}), ...);
        };
        apply(load_block<kOrder>(from + d)...);
      },
      [&](int64_t d, int count) {
        const auto results = function(load(from + d, count)...);
        (store(out[kOutput] + d, results.at[kOutput], count), ...);
      });
}

template <class T, size_t... kOutput, class Function, class... Inputs>
void pointwise_as(std::index_sequence<kOutput...> outputs, int64_t rows, int64_t dim, Function function,
                  void* const* to, Inputs... from) {
  const bool stream = worth_streaming<T>(rows, dim, to[kOutput]...);
  constexpr int64_t kArrays = sizeof...(kOutput) + sizeof...(from);
  for_each_span<T>(rows, dim, ((from.stride == dim) && ...), kArrays, [&](int64_t row, int64_t offset, int64_t size) {
    T* const out[] = {static_cast<T*>(to[kOutput]) + row * dim + offset...};
    const auto run = [&](auto... in) {
      stream ? pointwise_span<true>(outputs, size, function, out, in...)
             : pointwise_span<false>(outputs, size, function, out, in...);
    };
    run(static_cast<const T*>(from.data) + row * from.stride + offset...);
  });
}

// Applies `function`, which takes a vector of each input and returns Results, one for each output.
template <class Function, int kOutputs, class... Inputs>
void pointwise(DType dtype, int64_t rows, int64_t dim, Function function, Outputs<kOutputs> to, Inputs... from) {
  with_type(dtype, [&](auto element) {
    pointwise_as<decltype(element)>(std::make_index_sequence<kOutputs>{}, rows, dim, function, to.at, from...);
  });
}

}  // namespace llmsys::cpu::LLMSYS_ISA
