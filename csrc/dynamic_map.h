// The dynamic map of 8-bit block-wise quantisation: 256 numbers in [-1, 1] (signed) or [0, 1] (unsigned), in order; a
// code is the index of one. Source: Dettmers et al. 2021, arXiv:2110.02861, section 2.1, with the decades of its code.
//
// There are 0, 1, and seven decades, e = 1 ... 7, each with twice the numbers of the one below, evenly spaced in
// 10^(e-7) * (0.1, 1). An integer J stands for each number, 2^e <= J < 2^(e+1) in decade e:
//
//   signed     magnitude k = 0 ... 128, code 127 + k or 127 - k;  J = 2 k + 1, the odd ones
//   unsigned   code 0 ... 255;                                    J = code + 1
//
// 0 is e = 0 and 1 is e = 8: they share one entry of the tables, since eight is what a vector register holds.
#pragma once

namespace llmsys {

struct DynamicMap {
  // A number is step * J + offset, by (e - 1) % 8.
  float step[8], offset[8];
  // The nearest number to y >= 0, by e % 8: e is the first whose `end`, halfway to the next decade, is above y, and J,
  // or one above it in the signed map, is the whole part of 2^e * min(slope * y + 8/9, the number below 2).
  float end[8], slope[8];
};

namespace dynamic_map {

constexpr DynamicMap make(bool is_signed) {
  DynamicMap map{};
  double power = 1e6, last = 0;  // the last number of the decade below
  for (int e = 1; e < 8; ++e, power /= 10) {
    const int size = 1 << e, first_j = is_signed ? size + 1 : size;
    const float step = float(0.9 / (power * size));
    const float offset = float(((is_signed ? 0.0 : 0.45 / size) - 0.8) / power);
    map.step[e - 1] = step;
    map.offset[e - 1] = offset;
    map.end[e - 1] = float((last + double(step * float(first_j) + offset)) / 2);
    map.slope[e] = float(power / 0.9);
    last = double(step * float(2 * size - 1) + offset);
  }
  map.step[7] = is_signed ? 1.0f / 256 : 1.0f / 255;
  map.offset[7] = -map.step[7];
  map.end[7] = float((last + 1) / 2);
  map.slope[0] = 0.1115f;  // of 1: from where it is nearest, 2^8 * (slope * y + 8/9) is 256 and a fraction
  return map;
}

}  // namespace dynamic_map

constexpr DynamicMap kSignedMap = dynamic_map::make(true), kUnsignedMap = dynamic_map::make(false);
constexpr int kSignedZero = 127;  // the code of 0; in the unsigned map it is 0
constexpr float kIntercept = 8.0f / 9, kBelowTwo = 1.99999988f;

// The e of y >= 0, or one less, is the whole part of max(0, bits(y) * kDecadesPerBit + kDecadeOfZeroBits): the bits of
// a float32 are nearly its logarithm.
constexpr float kDecadesPerBit = 3.5885572e-08f;  // log10(2) / 2^23
constexpr float kDecadeOfZeroBits = -30.7308f;    // 7.5 - 127 log10(2)

}  // namespace llmsys
