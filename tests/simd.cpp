// The functions of csrc/cpu/simd over arrays, for tests/test_simd.py: compiled once per instruction set.
#include "../csrc/cpu/functions.h"

using namespace llmsys::cpu::LLMSYS_ISA;
using llmsys::DType;

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

enum class Way { single, pair, streamed_pair, block, streamed_block, partial };  // by which loads and stores

template <class From, class To, class Function>
void apply(Way way, const From* from, To* to, int64_t size, Function function) {
  if (way == Way::partial) {  // 1 element, then 2, ... a whole vector, and again
    for (int64_t at = 0, count = 1; at < size; at += count, count = count % kLanes + 1) {
      if (count > size - at) count = size - at;
      store(to + at, function(load(from + at, int(count))), int(count));
    }
    return;
  }
  for (int64_t at = 0; at + 2 * kLanes <= size; at += 2 * kLanes) {
    if (way == Way::block || way == Way::streamed_block) {
      Block block = load_block<Order::alternate>(from + at);
      block = {function(block.first), function(block.second)};
      way == Way::block ? store_block<Order::alternate, false>(to + at, block)
                        : store_block<Order::alternate, true>(to + at, block);
      continue;
    }
    const F32 low = function(load(from + at)), high = function(load(from + at + kLanes));
    if (way == Way::single) {
      store(to + at, low);
      store(to + at + kLanes, high);
    } else if (way == Way::pair) {
      store_pair<false>(to + at, low, high);
    } else {
      store_pair<true>(to + at, low, high);
    }
  }
  stream_fence();
}

}  // namespace

EXPORT int vector_bytes() { return LLMSYS_VECTOR_BYTES; }

EXPORT void convert(int way, const void* from, int from_type, void* to, int to_type, int64_t size) {
  with_type(DType(from_type), [&](auto a) {
    with_type(DType(to_type), [&](auto b) {
      apply(Way(way), static_cast<const decltype(a)*>(from), static_cast<decltype(b)*>(to), size,
            [](F32 value) { return value; });
    });
  });
}

EXPORT void vector_exp(const float* from, float* to, int64_t size) {
  apply(Way::pair, from, to, size, [](F32 x) { return exp(x); });
}

EXPORT void block_exp(const float* from, float* to, int64_t size) {
  for (int64_t at = 0; at + 2 * kLanes <= size; at += 2 * kLanes)
    store_block<Order::halves, false>(to + at, exp(load_block<Order::halves>(from + at)));
}

EXPORT void vector_sqrt(const float* from, float* to, int64_t size) {
  apply(Way::pair, from, to, size, [](F32 x) { return sqrt(x); });
}

EXPORT void vector_tanh(const float* from, float* to, int64_t size) {
  apply(Way::pair, from, to, size, [](F32 x) { return tanh(x); });
}

EXPORT void vector_normal_cdf(const float* from, float* to, int64_t size) {
  apply(Way::pair, from, to, size, [](F32 x) { return normal(x).cdf; });
}

EXPORT void vector_bell(const float* from, float* to, int64_t size) {
  apply(Way::pair, from, to, size, [](F32 x) { return bell(x); });
}

EXPORT void saturated_bytes(const int32_t* from, uint8_t* to, int64_t size, int16_t shift) {
  for (int64_t at = 0; at < size; at += 4 * kLanes) {
    I32 values[4];
    memcpy(values, from + at, sizeof values);
    store_bytes(to + at, values, shift);
  }
}

EXPORT void rounded_bytes(int way, const float* from, int8_t* to, int64_t size) {
  for (int64_t at = 0, count; at < size; at += count) {
    count = Way(way) == Way::partial ? at % kLanes + 1 : kLanes;
    if (count > size - at) count = size - at;
    store_some(to + at, load_some(from + at, int(count)), int(count));
  }
}

EXPORT void look_up(const float* eight, const uint32_t* sixteen, const uint32_t* index, float* of_eight,
                    uint32_t* of_sixteen, int64_t size) {
  float floats[8];
  uint32_t integers[16];
  memcpy(floats, eight, sizeof floats);
  memcpy(integers, sixteen, sizeof integers);
  for (int64_t at = 0; at < size; at += kLanes) {
    U32 here;
    memcpy(&here, index + at, sizeof here);
    store(of_eight + at, lookup(floats, here));
    store_vector<false>(of_sixteen + at, lookup(integers, here));
  }
}

EXPORT void extremes(const float* a, const float* b, float* lower, float* upper, int64_t size) {
  for (int64_t at = 0; at < size; at += kLanes) {
    store(lower + at, min(load(a + at), load(b + at)));
    store(upper + at, max(load(a + at), load(b + at)));
  }
}

EXPORT uint32_t largest_lane(const uint32_t* from) {
  U32 lanes;
  memcpy(&lanes, from, sizeof lanes);
  return max_lane(lanes);
}
