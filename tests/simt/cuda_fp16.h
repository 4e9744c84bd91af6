// Stands in for CUDA's <cuda_fp16.h>: the part of it that csrc/cuda uses, with the bits that a GPU gives.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

struct __half {
  uint16_t bits;
};

inline float __half2float(__half value) {
  uint32_t bits = uint32_t(value.bits & 0x7fff) << 13;
  float magnitude;
  std::memcpy(&magnitude, &bits, sizeof magnitude);
  magnitude *= (value.bits & 0x7c00) == 0x7c00 ? INFINITY : 0x1p112f;  // exponent bias 15 to 127
  if ((value.bits & 0x7fff) > 0x7c00) return NAN;
  return value.bits & 0x8000 ? -magnitude : magnitude;
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

struct __half2 {
  __half x, y;
};

inline __half2 __floats2half2_rn(float x, float y) { return {__float2half_rn(x), __float2half_rn(y)}; }
