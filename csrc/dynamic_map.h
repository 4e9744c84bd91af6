// The dynamic map of 8-bit block-wise quantisation: 256 numbers in [-1, 1] (signed) or [0, 1] (unsigned), in order; a
// code is the index of one. Source: Dettmers et al. 2021, arXiv:2110.02861, section 2.1, with the decades of its code.
//
// There are 0, 1, and seven decades, e = 1 ... 7, each with twice the numbers of the one below, evenly spaced in
// 10^(e-7) * (0.1, 1). An integer J stands for each number, 2^e <= J < 2^(e+1) in decade e:
//
//   signed     magnitude k = 0 ... 128, code 127 + k or 127 - k;  J = 2 k + 1, the odd ones
//   unsigned   code 0 ... 255;                                    J = code + 1
//
// 0 is e = 0 and 1 is e = 8: they share one entry of the tables by e % 8, since eight is what a vector register holds.
#pragma once

#include <cstdint>

namespace llmsys {

struct DynamicMap {
  // A number is step * j + offset, where j is 4 k or 2 J: exact in float32, with e + 128 for its biased exponent, but
  // for k = 0.
  float step[8], offset[8];
  // The nearest number to y, 2^-31 <= y <= 1: e + 64 is (bits(y) + decade[bits(y) >> 24 & 15]) >> 24, and k or J is the
  // whole part of 2^(e+64) * min(slope[e] * y + intercept, below_two).
  uint32_t decade[16];
  float slope[8], intercept, below_two;
};

constexpr float kSmallestQuotient = 0x1p-31f;  // smaller ones are nearest to 0 too

namespace dynamic_map {

// The bits of a positive float32.
constexpr uint32_t bits_of(float value) {
  double mantissa = value;
  uint32_t exponent = 127;
  for (; mantissa < 1; mantissa *= 2) --exponent;
  return (exponent << 23) + uint32_t((mantissa - 1) * (1 << 23));
}

constexpr DynamicMap make(bool is_signed) {
  DynamicMap map{};
  const float scale = is_signed ? 0x1p-65f : 0x1p-64f;  // takes back the 64 that e is given; k is half of J
  float end[8] = {};                                    // halfway from the last number of decade e to the next
  double power = 1e6, last = 0;
  for (int e = 1; e < 8; ++e, power /= 10) {
    const int size = 1 << e, first_j = 2 * size, last_j = 4 * size - (is_signed ? 4 : 2);
    const float step = map.step[e] = float(0.45 / (power * size));
    const float offset = map.offset[e] = float(((is_signed ? 0.9 : 0.45) / size - 0.8) / power);
    end[e - 1] = float((last + double(step * float(first_j) + offset)) / 2);
    map.slope[e] = float(power / 0.9) * scale;
    last = double(step * float(last_j) + offset);
  }
  end[7] = float((last + 1) / 2);
  map.step[0] = is_signed ? 1.0f / 512 : 0.5f / 255;
  map.offset[0] = is_signed ? 0.0f : -1.0f / 255;
  map.slope[0] = 0.1118f * scale;  // of 1: from where it is nearest, 2^8 * (slope * y + 8/9) is 256 and a fraction
  map.intercept = 8.0f / 9 * scale;
  map.below_two = 1.99999988f * scale;
  // A sixteenth is a factor of 4, in which at most one decade ends. Where one does, y carries into the next from there.
  for (uint32_t i = 0; i < 16; ++i) {
    const uint32_t from = 48 + i;  // bits(y) >> 24
    uint32_t e = 0;
    while (e < 8 && bits_of(end[e]) <= from << 24) ++e;
    map.decade[i] = (64 + e - from) << 24;
    if (e < 8 && bits_of(end[e]) >> 24 == from) map.decade[i] += (1u << 24) - (bits_of(end[e]) & 0xffffffu);
  }
  return map;
}

}  // namespace dynamic_map

constexpr DynamicMap kSignedMap = dynamic_map::make(true), kUnsignedMap = dynamic_map::make(false);
constexpr int kSignedZero = 127;  // the code of 0; in the unsigned map it is 0

}  // namespace llmsys
