#include "../swiglu.h"

#include "dispatch.h"
#include "functions.h"
#include "pointwise.h"
#include "stream.h"

namespace llmsys::cpu::LLMSYS_ISA {
namespace {

// dgate = dy * up * sigmoid(gate) * (1 + gate * (1 - sigmoid(gate))), dup = dy * gate * sigmoid(gate)
struct Gradients {
  F32 gate, up;
};
LLMSYS_INLINE Gradients gradients(F32 dy, F32 gate, F32 up, F32 sigmoid) {
  F32 silu = gate * sigmoid;
  return {dy * up * multiply_add(silu, 1.0f - sigmoid, sigmoid), dy * silu};
}

template <bool kStream, class T>
void forward_span(const T* gate, const T* up, T* y, int64_t size) {
  constexpr Order kOrder = order_of<T>;
  for_each_pair(
      size,
      [&](int64_t d) {
        Block activated = silu(load_block<kOrder>(gate + d)), u = load_block<kOrder>(up + d);
        store_block<kOrder, kStream>(y + d, {activated.first * u.first, activated.second * u.second});
      },
      [&](int64_t d, int count) { store(y + d, silu(load(gate + d, count)) * load(up + d, count), count); });
}

template <bool kStream, class T>
void backward_span(const T* dy, const T* gate, const T* up, T* dgate, T* dup, int64_t size) {
  constexpr Order kOrder = order_of<T>;
  for_each_pair(
      size,
      [&](int64_t d) {
        Block g = load_block<kOrder>(gate + d), u = load_block<kOrder>(up + d), arriving = load_block<kOrder>(dy + d);
        Block s = sigmoid(g);
        Gradients first = gradients(arriving.first, g.first, u.first, s.first);
        Gradients second = gradients(arriving.second, g.second, u.second, s.second);
        store_block<kOrder, kStream>(dgate + d, {first.gate, second.gate});
        store_block<kOrder, kStream>(dup + d, {first.up, second.up});
      },
      [&](int64_t d, int count) {
        F32 g = load(gate + d, count);
        Gradients both = gradients(load(dy + d, count), g, load(up + d, count), sigmoid(g));
        store(dgate + d, both.gate, count);
        store(dup + d, both.up, count);
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
