#include "../swiglu.h"

#include "dispatch.h"
#include "parallel.h"
#include "simd.h"
#include "stream.h"

namespace llmsys::cpu::LLMSYS_ISA {
namespace {

LLMSYS_INLINE F32 swiglu(F32 gate, F32 up) { return gate * sigmoid(gate) * up; }

// dgate = dy * up * sigmoid(gate) * (1 + gate * (1 - sigmoid(gate))), dup = dy * gate * sigmoid(gate)
struct Gradients {
  F32 gate, up;
};
LLMSYS_INLINE Gradients swiglu_gradients(F32 dy, F32 gate, F32 up) {
  F32 s = sigmoid(gate);
  F32 silu = gate * s;
  return {dy * up * (s + silu * (1.0f - s)), dy * silu};
}

template <bool kStream, class T>
void forward_span(const T* gate, const T* up, T* y, int64_t size) {
  for_each_pair(
      size,
      [&](int64_t d) {
        store_pair<kStream>(y + d, swiglu(load(gate + d), load(up + d)),
                            swiglu(load(gate + d + kLanes), load(up + d + kLanes)));
      },
      [&](int64_t d, int count) { store(y + d, swiglu(load(gate + d, count), load(up + d, count)), count); });
}

template <bool kStream, class T>
void backward_span(const T* dy, const T* gate, const T* up, T* dgate, T* dup, int64_t size) {
  for_each_pair(
      size,
      [&](int64_t d) {
        Gradients low = swiglu_gradients(load(dy + d), load(gate + d), load(up + d));
        Gradients high = swiglu_gradients(load(dy + d + kLanes), load(gate + d + kLanes), load(up + d + kLanes));
        store_pair<kStream>(dgate + d, low.gate, high.gate);
        store_pair<kStream>(dup + d, low.up, high.up);
      },
      [&](int64_t d, int count) {
        Gradients g = swiglu_gradients(load(dy + d, count), load(gate + d, count), load(up + d, count));
        store(dgate + d, g.gate, count);
        store(dup + d, g.up, count);
      });
}

// Calls span(row, offset, size) over all elements: runs inside rows, or one long row where every stride allows it.
template <class T, class Span>
void for_each_span(int64_t rows, int64_t dim, bool contiguous, int64_t arrays, Span span) {
  if (contiguous) {
    dim *= rows;
    rows = 1;
  }
  // Runs start on whole vectors, so that aligned arrays stay aligned.
  constexpr int64_t kRun = 4096;
  const int64_t runs = (dim + kRun - 1) / kRun;
  parallel_for(rows * runs, grain_of(arrays * (dim < kRun ? dim : kRun) * int64_t(sizeof(T))),
               [&](int64_t begin, int64_t end) {
                 for (int64_t i = begin; i < end; ++i) {
                   int64_t offset = i % runs * kRun;
                   span(i / runs, offset, dim - offset < kRun ? dim - offset : kRun);
                 }
                 stream_fence();
               });
}

template <bool kStream, class T>
void forward(const SwiGLUForward& args) {
  const bool contiguous = args.gate_stride == args.dim && args.up_stride == args.dim;
  for_each_span<T>(args.rows, args.dim, contiguous, 3, [&](int64_t row, int64_t offset, int64_t size) {
    forward_span<kStream>(static_cast<const T*>(args.gate) + row * args.gate_stride + offset,
                          static_cast<const T*>(args.up) + row * args.up_stride + offset,
                          static_cast<T*>(args.y) + row * args.dim + offset, size);
  });
}

template <bool kStream, class T>
void backward(const SwiGLUBackward& args) {
  const bool contiguous = args.dy_stride == args.dim && args.gate_stride == args.dim && args.up_stride == args.dim;
  for_each_span<T>(args.rows, args.dim, contiguous, 5, [&](int64_t row, int64_t offset, int64_t size) {
    backward_span<kStream>(static_cast<const T*>(args.dy) + row * args.dy_stride + offset,
                           static_cast<const T*>(args.gate) + row * args.gate_stride + offset,
                           static_cast<const T*>(args.up) + row * args.up_stride + offset,
                           static_cast<T*>(args.dgate) + row * args.dim + offset,
                           static_cast<T*>(args.dup) + row * args.dim + offset, size);
  });
}

}  // namespace

void swiglu_forward(const SwiGLUForward& args) {
  with_type(args.dtype, [&](auto element) {
    using T = decltype(element);
    worth_streaming<T>(args.rows, args.dim, args.y) ? forward<true, T>(args) : forward<false, T>(args);
  });
}

void swiglu_backward(const SwiGLUBackward& args) {
  with_type(args.dtype, [&](auto element) {
    using T = decltype(element);
    worth_streaming<T>(args.rows, args.dim, args.dgate, args.dup) ? backward<true, T>(args) : backward<false, T>(args);
  });
}

}  // namespace llmsys::cpu::LLMSYS_ISA

LLMSYS_DISPATCH(swiglu_forward, SwiGLUForward)
LLMSYS_DISPATCH(swiglu_backward, SwiGLUBackward)
