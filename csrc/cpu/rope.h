// The rotation of one head by its token's row of the tables.
#pragma once

#include "simd.h"

namespace llmsys::cpu::LLMSYS_ISA {

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

template <bool kStream, class T, class Y>
void rotate_halves(const T* x, const float* cos, const float* sin, Y* y, int64_t half, U32 signs) {
  const T* x2 = x + half;
  Y* y2 = y + half;
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

template <bool kStream, class T, class Y>
void rotate_interleaved(const T* x, const float* cos, const float* sin, Y* y, int64_t size, U32 signs) {
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
LLMSYS_INLINE U32 signs_of(bool interleaved, bool inverse) {
  U32 signs = {};
  for (int lane = 0; lane < kLanes; ++lane)
    if (interleaved ? (lane % 2 == 1) == inverse : inverse) signs[lane] = 0x80000000u;
  return signs;
}

// The first `rotary_dim` elements of a head, with `signs` from signs_of. y may be x.
template <bool kStream, class T, class Y>
void rotate_head(const T* x, const float* cos, const float* sin, Y* y, int64_t rotary_dim, bool interleaved,
                 U32 signs) {
  if (interleaved)
    rotate_interleaved<kStream>(x, cos, sin, y, rotary_dim, signs);
  else
    rotate_halves<kStream>(x, cos, sin, y, rotary_dim / 2, signs);
}

}  // namespace llmsys::cpu::LLMSYS_ISA
