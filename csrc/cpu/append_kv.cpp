#include "../append_kv.h"

#include "buffer.h"
#include "dispatch.h"
#include "parallel.h"
#include "rope.h"

namespace llmsys::cpu::LLMSYS_ISA {
namespace {

LLMSYS_INLINE U32 magnitude(F32 x) { return as_u32(x) & 0x7fffffffu; }

// In the order of bits, where NaN is above all.
template <class T>
float largest_magnitude(const T* x, int64_t size) {
  U32 largest = {};
  for_each_pair(
      size, [&](int64_t d) { largest = max(largest, max(magnitude(load(x + d)), magnitude(load(x + d + kLanes)))); },
      [&](int64_t d, int count) { largest = max(largest, magnitude(load(x + d, count))); });
  const uint32_t bits = max_lane(largest);
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// Codes of x, and their scale.
template <class T>
float quantise(const T* x, int8_t* codes, int64_t size) {
  constexpr float kLargest = 127.0f;
  const float scale = largest_magnitude(x, size) / kLargest;
  if (!(scale > 0.0f && scale < __builtin_inff())) {
    for (int64_t d = 0; d < size; ++d) codes[d] = 0;
    return scale;
  }
  // A subnormal scale is so coarse that quotients may be larger.
  const auto code = [&](F32 value) { return max(min(value / scale, splat(kLargest)), splat(-kLargest)); };
  for_each_pair(
      size,
      [&](int64_t d) {
        store(codes + d, code(load(x + d)));
        store(codes + d + kLanes, code(load(x + d + kLanes)));
      },
      [&](int64_t d, int count) { store(codes + d, code(load(x + d, count)), count); });
  return scale;
}

template <class From, class To>
void copy(const From* from, To* to, int64_t size) {
  if constexpr (__is_same(From, To)) {
    if (size) memcpy(to, from, size * sizeof(To));
  } else {
    for (int64_t d = 0; d < size; d += kLanes) {
      const int count = size - d < kLanes ? int(size - d) : kLanes;
      store_some(to + d, load_some(from + d, count), count);
    }
  }
}

// A token's row of the tables.
struct Angles {
  const float *cos, *sin;
  U32 signs;
  bool interleaved;
};

// Where a token goes.
struct Place {
  int64_t block, row;
};

Place place_of(const AppendKV& args, int64_t sequence, int64_t token) {
  const int64_t place = args.cache_seqlens[sequence] + token;
  if (!args.block_table) return {sequence, place};
  return {args.block_table[sequence * args.block_table_stride + place / args.block_size], place % args.block_size};
}

// One head, into its row of a cache whose elements are T or, where `scale` is their scale's place, int8.
template <class T, class Element>
void write(const Appended& part, const T* x, const Angles& angles, Element* row, float* scale, float* rotated) {
  const int64_t rest = part.dim - part.rotary_dim;
  const auto rotate_to = [&](auto* y) {
    rotate_head<false>(x, angles.cos, angles.sin, y, part.rotary_dim, angles.interleaved, angles.signs);
    copy(x + part.rotary_dim, y + part.rotary_dim, rest);
  };
  if constexpr (!__is_same(Element, int8_t)) {
    rotate_to(row);
  } else if (part.rotary_dim) {
    rotate_to(rotated);
    *scale = quantise(rotated, row, part.dim);
  } else {
    *scale = quantise(x, row, part.dim);
  }
}

// Heads `first` to `last` of a token.
template <class T, class Element>
void append(const Appended& part, int64_t sequence, int64_t token, int64_t first, int64_t last, const Place& place,
            const Angles& angles, float* rotated, Element* packed) {
  const T* x = static_cast<const T*>(part.x) + sequence * part.batch_stride + token * part.token_stride;
  Element* cache =
      static_cast<Element*>(part.cache) + place.block * part.cache_block_stride + place.row * part.cache_token_stride;
  float* scales = part.scale + place.block * part.scale_block_stride + place.row * part.scale_token_stride;
  for (int64_t head = first; head < last; ++head) {
    Element* row = cache + head * part.cache_head_stride;
    const bool apart = part.cache_dim_stride != 1;
    write(part, x + head * part.head_stride, angles, apart ? packed : row, scales + head * part.scale_head_stride,
          rotated);
    if (apart)
      for (int64_t d = 0; d < part.dim; ++d) row[d * part.cache_dim_stride] = packed[d];
  }
}

template <class T, class Element>
void run(const AppendKV& args) {
  const Appended keys = keys_of(args), values = values_of(args);
  const U32 signs = signs_of(args.interleaved, false);
  const int64_t head_bytes = (args.dim + args.value_dim) * int64_t(sizeof(T) + sizeof(Element));
  parallel_for(args.batch * args.tokens * args.heads, grain_of(head_bytes), [&](int64_t begin, int64_t end) {
    static thread_local Buffer buffer;
    const int64_t longest = args.dim > args.value_dim ? args.dim : args.value_dim;
    float* rotated = buffer.at_least(2 * longest);
    Element* packed = reinterpret_cast<Element*>(rotated + longest);
    for (int64_t i = begin, next; i < end; i = next) {
      const int64_t nth = i / args.heads, sequence = nth / args.tokens, token = nth % args.tokens;
      next = (nth + 1) * args.heads < end ? (nth + 1) * args.heads : end;
      const int64_t first = i - nth * args.heads, last = next - nth * args.heads;
      const int64_t angle = sequence * args.table_batch_stride + token * args.table_token_stride;
      const Place place = place_of(args, sequence, token);
      const Angles angles{args.cos + angle, args.sin + angle, signs, args.interleaved};
      append<T>(keys, sequence, token, first, last, place, angles, rotated, packed);
      append<T>(values, sequence, token, first, last, place, angles, rotated, packed);
    }
  });
}

}  // namespace

void append_kv(const AppendKV& args) {
  with_type(args.dtype, [&](auto element) {
    using T = decltype(element);
    args.int8 ? run<T, int8_t>(args) : run<T, T>(args);
  });
}

}  // namespace llmsys::cpu::LLMSYS_ISA

LLMSYS_DISPATCH(append_kv, AppendKV)
