// Stands in for CUDA's <cuda_fp16.h>: the part of it that csrc/cuda uses, with the bits that a GPU gives.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

struct __half {
  uint16_t bits;
};

inline float __half2float(__half value) {
  const int exponent = (value.bits >> 10) & 31, fraction = value.bits & 1023;
  const float sign = value.bits & 0x8000 ? -1.0f : 1.0f;
  if (exponent == 31) return sign * (fraction ? NAN : INFINITY);
  if (exponent == 0) return sign * std::ldexp(float(fraction), -24);
  return sign * std::ldexp(float(1024 + fraction), exponent - 25);
}

inline __half __float2half_rn(float value) {
  if (value != value) return {0x7fff};
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const float magnitude = std::fabs(value);
  if (magnitude >= 65520.0f) return {uint16_t(sign | 0x7c00)};  // half way from the largest half to 65536
  if (magnitude < 0x1p-14f) return {uint16_t(sign | int(std::nearbyint(magnitude * 0x1p24f)))};
  uint32_t bits;
  std::memcpy(&bits, &magnitude, sizeof bits);
  bits += 0xfffu + ((bits >> 13) & 1u) - (112u << 23);  // round the 13 bits that do not fit; exponent bias 127 to 15
  return {uint16_t(sign | bits >> 13)};
}
