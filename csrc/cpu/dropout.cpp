#include "../dropout.h"

#include "dispatch.h"
#include "parallel.h"
#include "philox.h"
#include "simd.h"
#include "stream.h"

namespace llmsys::cpu::LLMSYS_ISA {
namespace {

// `element` is the number of the first among all that the seed serves.
template <bool kStream, class T>
void drop(const T* x, T* y, int64_t size, uint64_t element, const Dropout& args) {
  const PhiloxKeys keys(args.seed);
  const U32 threshold = splat(args.threshold);
  auto kept = [&](U32 words, F32 value) { return select(words >= threshold, value * args.scale, F32{}); };
  for_each_pair(
      size,
      [&](int64_t d) {
        Words words = random_words(keys, element + d);
        store_pair<kStream>(y + d, kept(words.low, load(x + d)), kept(words.high, load(x + d + kLanes)));
      },
      [&](int64_t d, int count) {
        store(y + d, kept(random_words(keys, element + d).low, load(x + d, count)), count);
      });
}

template <bool kStream, class T>
void run(const Dropout& args) {
  const bool contiguous = args.x_stride == args.dim;
  const int64_t rows = contiguous ? 1 : args.rows, dim = contiguous ? args.rows * args.dim : args.dim;
  constexpr int64_t kRun = 4096;  // whole vectors, so that aligned arrays stay aligned
  const int64_t runs = (dim + kRun - 1) / kRun;
  // The words cost more than the traffic: a thread pays off earlier than grain_of would have it.
  const int64_t run_bytes = 4 * (dim < kRun ? dim : kRun) * int64_t(sizeof(float));
  parallel_for(rows * runs, grain_of(run_bytes), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / runs, d = i % runs * kRun;
      drop<kStream>(static_cast<const T*>(args.x) + row * args.x_stride + d, static_cast<T*>(args.y) + row * dim + d,
                    dim - d < kRun ? dim - d : kRun, uint64_t(args.offset) + uint64_t(row * dim + d), args);
    }
    stream_fence();
  });
}

}  // namespace

void dropout(const Dropout& args) {
  with_type(args.dtype, [&](auto element) {
    using T = decltype(element);
    worth_streaming<T>(args.rows, args.dim, args.y) ? run<true, T>(args) : run<false, T>(args);
  });
}

}  // namespace llmsys::cpu::LLMSYS_ISA

LLMSYS_DISPATCH(dropout, Dropout)
