#include "../rope.h"

#include "dispatch.h"
#include "parallel.h"
#include "simd.h"
#include "stream.h"

namespace llmsys::cpu::LLMSYS_ISA {
namespace {

typedef uint32_t U32Half __attribute__((vector_size(LLMSYS_VECTOR_BYTES / 2)));

LLMSYS_INLINE F32 flipped(F32 value, U32 signs) { return as_f32(as_u32(value) ^ signs); }

// The two elements of each pair, exchanged.
LLMSYS_INLINE F32 swapped(F32 value) {
  U64 pairs = reinterpret_cast<U64>(value);
  return reinterpret_cast<F32>(pairs << 32 | pairs >> 32);
}

// kLanes / 2 elements, each twice; the form with `count` reads count / 2.
LLMSYS_INLINE F32 load_twice(const float* p) {
  U32Half bits;
  memcpy(&bits, p, sizeof bits);
  U64 wide = __builtin_convertvector(bits, U64);
  return reinterpret_cast<F32>(wide | wide << 32);
}
LLMSYS_INLINE F32 load_twice(const float* p, int count) {
  float lanes[kLanes / 2] = {};
  memcpy(lanes, p, count / 2 * sizeof(float));
  return load_twice(lanes);
}

struct Rotated {
  F32 first, second;
};
LLMSYS_INLINE Rotated rotate(F32 first, F32 second, F32 cos, F32 sin) {
  return {first * cos - second * sin, second * cos + first * sin};
}

template <bool kStream, class T>
void rotate_halves(const T* x, const float* cos, const float* sin, T* y, int64_t half, U32 signs) {
  const T* x2 = x + half;
  T* y2 = y + half;
  for_each_pair(
      half,
      [&](int64_t i) {
        const int64_t j = i + kLanes;
        Rotated low = rotate(load(x + i), load(x2 + i), load(cos + i), flipped(load(sin + i), signs));
        Rotated high = rotate(load(x + j), load(x2 + j), load(cos + j), flipped(load(sin + j), signs));
        store_pair<kStream>(y + i, low.first, high.first);
        store_pair<kStream>(y2 + i, low.second, high.second);
      },
      [&](int64_t i, int count) {
        F32 s = flipped(load(sin + i, count), signs);
        Rotated both = rotate(load(x + i, count), load(x2 + i, count), load(cos + i, count), s);
        store(y + i, both.first, count);
        store(y2 + i, both.second, count);
      });
}

template <bool kStream, class T>
void rotate_interleaved(const T* x, const float* cos, const float* sin, T* y, int64_t size, U32 signs) {
  auto turned = [&](F32 value, F32 c, F32 s) { return value * c + swapped(value) * flipped(s, signs); };
  auto whole = [&](int64_t d) { return turned(load(x + d), load_twice(cos + d / 2), load_twice(sin + d / 2)); };
  for_each_pair(
      size, [&](int64_t d) { store_pair<kStream>(y + d, whole(d), whole(d + kLanes)); },
      [&](int64_t d, int count) {
        F32 c = load_twice(cos + d / 2, count), s = load_twice(sin + d / 2, count);
        store(y + d, turned(load(x + d, count), c, s), count);
      });
}

// Which lanes of sin change sign: interleaved, the sign belongs to one element of the pair, else to the formula.
U32 signs_of(const Rope& args) {
  U32 signs = {};
  for (int lane = 0; lane < kLanes; ++lane)
    if (args.interleaved ? (lane % 2 == 1) == args.inverse : args.inverse) signs[lane] = 0x80000000u;
  return signs;
}

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
    if (args.interleaved)
      rotate_interleaved<kStream>(heads.x, cos, sin, heads.y, args.rotary_dim, signs);
    else
      rotate_halves<kStream>(heads.x, cos, sin, heads.y, args.rotary_dim / 2, signs);
    if (heads.x != heads.y) memcpy(heads.y + args.rotary_dim, heads.x + args.rotary_dim, rest * sizeof(T));
  }
}

template <bool kStream, class T>
void run(const Rope& args) {
  const U32 signs = signs_of(args);
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
