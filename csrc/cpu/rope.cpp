#include "../rope.h"

#include "dispatch.h"
#include "parallel.h"
#include "rope.h"
#include "stream.h"

namespace llmsys::cpu::LLMSYS_ISA {
namespace {

// The heads of one token, of queries or of keys.
template <class T>
struct Heads {
  const T* x;
  T* y;
  int64_t count, x_stride, y_stride;
};

template <class T>
Heads<T> queries(const Rope& args, int64_t sequence, int64_t token) {
  return {static_cast<const T*>(args.q) + sequence * args.q_batch_stride + token * args.q_token_stride,
          static_cast<T*>(args.q_out) + sequence * args.q_out_batch_stride + token * args.q_out_token_stride,
          args.q_heads, args.q_head_stride, args.q_out_head_stride};
}

template <class T>
Heads<T> keys(const Rope& args, int64_t sequence, int64_t token) {
  return {static_cast<const T*>(args.k) + sequence * args.k_batch_stride + token * args.k_token_stride,
          static_cast<T*>(args.k_out) + sequence * args.k_out_batch_stride + token * args.k_out_token_stride,
          args.k_heads, args.k_head_stride, args.k_out_head_stride};
}

template <bool kStream, class T>
void rotate_heads(const Rope& args, Heads<T> heads, const float* cos, const float* sin, U32 signs) {
  const int64_t rest = args.head_dim - args.rotary_dim;
  for (; heads.count > 0; --heads.count, heads.x += heads.x_stride, heads.y += heads.y_stride) {
    rotate_head<kStream>(heads.x, cos, sin, heads.y, args.rotary_dim, args.interleaved, signs);
    if (heads.x != heads.y) memcpy(heads.y + args.rotary_dim, heads.x + args.rotary_dim, rest * sizeof(T));
  }
}

template <bool kStream, class T>
void run(const Rope& args) {
  const U32 signs = signs_of(args.interleaved, args.inverse);
  const int64_t token_bytes = 2 * (args.q_heads + args.k_heads) * args.head_dim * int64_t(sizeof(T));
  parallel_for(args.batch * args.tokens, grain_of(token_bytes), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t sequence = i / args.tokens, token = i % args.tokens;
      const int64_t row = sequence * args.table_batch_stride + token * args.table_token_stride;
      const float *cos = args.cos + row, *sin = args.sin + row;
      rotate_heads<kStream>(args, queries<T>(args, sequence, token), cos, sin, signs);
      if (args.k_heads) rotate_heads<kStream>(args, keys<T>(args, sequence, token), cos, sin, signs);
    }
    stream_fence();
  });
}

// Whether the outputs are large, and every head, and every half where halves are written, starts on a whole vector.
template <class T>
bool streams(const Rope& args) {
  const int64_t half = args.interleaved ? 0 : args.rotary_dim / 2;
  const int64_t distances = half | args.q_out_batch_stride | args.q_out_token_stride | args.q_out_head_stride |
                            args.k_out_batch_stride | args.k_out_token_stride | args.k_out_head_stride;
  const uintptr_t bytes = uintptr_t(distances) * sizeof(T) | reinterpret_cast<uintptr_t>(args.k_out);
  const int64_t rows = args.batch * args.tokens * (args.q_heads + args.k_heads);
  return bytes % LLMSYS_VECTOR_BYTES == 0 && worth_streaming<T>(rows, args.head_dim, args.q_out);
}

}  // namespace

void rope(const Rope& args) {
  with_type(args.dtype, [&](auto element) {
    using T = decltype(element);
    streams<T>(args) ? run<true, T>(args) : run<false, T>(args);
  });
}

}  // namespace llmsys::cpu::LLMSYS_ISA

LLMSYS_DISPATCH(rope, Rope)
