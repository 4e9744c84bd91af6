#include "../adamw_8bit.h"

#include "../dynamic_map.h"
#include "adamw_update.h"
#include "dispatch.h"
#include "simd.h"
#include "tensor_list.h"

namespace llmsys::cpu::LLMSYS_ISA {
namespace {

constexpr int kBlock = int(kAdamW8bitBlock);

LLMSYS_INLINE F32 to_f32(U32 x) { return __builtin_convertvector(reinterpret_cast<I32>(x), F32); }
LLMSYS_INLINE I32 to_i32(F32 x) { return __builtin_convertvector(x, I32); }  // towards zero

LLMSYS_INLINE F32 number_of(const DynamicMap& map, F32 j) {
  const U32 entry = as_u32(j) >> 23;  // the biased exponent, 127 + e: e - 1 in its low three bits
  return multiply_add(lookup(map.step, entry), j, lookup(map.offset, entry));
}

LLMSYS_INLINE F32 decode_signed(U32 codes) {
  const F32 k = to_f32(codes) - float(kSignedZero);
  const U32 sign = as_u32(k) & 0x80000000u;
  return as_f32(as_u32(number_of(kSignedMap, multiply_add(as_f32(as_u32(k) ^ sign), 2.0f, 1.0f))) | sign);
}

LLMSYS_INLINE F32 decode_unsigned(U32 codes) { return number_of(kUnsignedMap, to_f32(codes) + 1.0f); }

constexpr int kAbreast = 4;  // vectors that are encoded step by step together, so that no step waits for the one before

// Codes of the numbers nearest to `from` * inverse.
template <bool kSigned>
LLMSYS_INLINE void encode(const float* from, float inverse, uint8_t* codes) {
  constexpr const DynamicMap& map = kSigned ? kSignedMap : kUnsignedMap;
  constexpr float kHalf = kSigned ? 0.5f : 1.0f;  // a magnitude is half of J
  F32 y[kAbreast], x[kAbreast];
  U32 sign[kAbreast];
  I32 e[kAbreast];
  for (int i = 0; i < kAbreast; ++i) y[i] = load(from + i * kLanes) * inverse;
  for (int i = 0; i < kAbreast; ++i) sign[i] = as_u32(y[i]) & (kSigned ? 0x80000000u : 0u);
  for (int i = 0; i < kAbreast; ++i) y[i] = as_f32(as_u32(y[i]) ^ sign[i]);
  for (int i = 0; i < kAbreast; ++i) x[i] = multiply_add(to_f32(as_u32(y[i])), kDecadesPerBit, kDecadeOfZeroBits);
  for (int i = 0; i < kAbreast; ++i) e[i] = to_i32(max(x[i], F32{}));
  for (int i = 0; i < kAbreast; ++i) x[i] = lookup(map.end, reinterpret_cast<U32>(e[i]));
  for (int i = 0; i < kAbreast; ++i) e[i] = e[i] - (y[i] >= x[i]);
  for (int i = 0; i < kAbreast; ++i) x[i] = lookup(map.slope, reinterpret_cast<U32>(e[i]));
  for (int i = 0; i < kAbreast; ++i) x[i] = multiply_add(x[i], y[i], kIntercept);
  for (int i = 0; i < kAbreast; ++i) x[i] = min(x[i], splat(kBelowTwo)) * kHalf;
  for (int i = 0; i < kAbreast; ++i) x[i] = as_f32((as_u32(x[i]) + (reinterpret_cast<U32>(e[i]) << 23)) | sign[i]);
  for (int i = 0; i < kAbreast; ++i) e[i] = to_i32(x[i]) + (kSigned ? kSignedZero : -1);
  for (int i = 0; i < kAbreast; ++i) e[i] = e[i] < 0 ? I32{} : e[i];  // of 0, and of -1, which has no code as 1 has
  for (int i = 0; i < kAbreast; i += 2)
    store_pair(codes + i * kLanes, reinterpret_cast<U32>(e[i]), reinterpret_cast<U32>(e[i + 1]));
}

// A block's scale, from lanes of the largest bits of its magnitudes: in the order of bits, NaN is above all.
LLMSYS_INLINE float scale_of(U32 largest) {
  uint32_t bits = 0x00800000u;  // 2^-126, whose inverse is finite
  for (int i = 0; i < kLanes; ++i)
    if (largest[i] > bits) bits = largest[i];
  if (bits >= 0x7f800000u) bits = 0x7fc00000u;
  float scale;
  memcpy(&scale, &bits, sizeof scale);
  return scale;
}

template <bool kSigned>
LLMSYS_INLINE void encode_block(const float* moments, float scale, uint8_t* codes) {
  if (scale != scale) {
    for (int i = 0; i < kBlock; ++i) codes[i] = kSigned ? kSignedZero : 0;
    return;
  }
  for (int i = 0; i < kBlock; i += kAbreast * kLanes) encode<kSigned>(moments + i, 1.0f / scale, codes + i);
}

template <class P, class G>
struct Block {
  P* param;
  const G* grad;
  uint8_t *exp_avg, *exp_avg_sq;
  float *exp_avg_scale, *exp_avg_sq_scale;
  float* master;
};

template <bool kFromGrad, class P, class G>
LLMSYS_INLINE void update_block(const AdamWShared& shared, const Block<P, G>& block) {
  alignas(64) float ms[kBlock], vs[kBlock];
  const float m_scale = *block.exp_avg_scale, v_scale = *block.exp_avg_sq_scale;
  U32 m_largest = {}, v_largest = {};
  for (int at = 0; at < kBlock; at += 2 * kLanes) {
    F32 p[2], g[2], m[2], v[2];
    for (int i = 0; i < 2; ++i) {
      p[i] = block.master ? load(block.master + at + i * kLanes) : load(block.param + at + i * kLanes);
      g[i] = load(block.grad + at + i * kLanes);
    }
    for (int i = 0; i < 2; ++i) m[i] = decode_signed(load(block.exp_avg + at + i * kLanes)) * m_scale;
    for (int i = 0; i < 2; ++i) v[i] = decode_unsigned(load(block.exp_avg_sq + at + i * kLanes)) * v_scale;
    for (int i = 0; i < 2; ++i) adamw_update<kFromGrad>(shared, g[i], p[i], m[i], v[i]);
    for (int i = 0; i < 2; ++i) {
      store(ms + at + i * kLanes, m[i]);
      store(vs + at + i * kLanes, v[i]);
      m_largest = max(m_largest, as_u32(m[i]) & 0x7fffffffu);
      v_largest = max(v_largest, as_u32(v[i]) & 0x7fffffffu);
    }
    if (block.master) store_pair<false>(block.master + at, p[0], p[1]);
    store_pair<false>(block.param + at, p[0], p[1]);
  }
  *block.exp_avg_scale = scale_of(m_largest);
  *block.exp_avg_sq_scale = scale_of(v_largest);
  encode_block<true>(ms, *block.exp_avg_scale, block.exp_avg);
  encode_block<false>(vs, *block.exp_avg_sq_scale, block.exp_avg_sq);
}

// A block of fewer elements, as a whole one filled up with zeros, which change neither scale.
template <bool kFromGrad, class P, class G>
__attribute__((noinline)) void update_part(const AdamWShared& shared, const Block<P, G>& part, int64_t size) {
  P param[kBlock] = {};
  G grad[kBlock] = {};
  uint8_t exp_avg[kBlock], exp_avg_sq[kBlock] = {};
  float master[kBlock] = {};
  memset(exp_avg, kSignedZero, sizeof exp_avg);
  memcpy(param, part.param, size * sizeof(P));
  memcpy(grad, part.grad, size * sizeof(G));
  memcpy(exp_avg, part.exp_avg, size);
  memcpy(exp_avg_sq, part.exp_avg_sq, size);
  if (part.master) memcpy(master, part.master, size * sizeof(float));
  update_block<kFromGrad, P, G>(shared, {param, grad, exp_avg, exp_avg_sq, part.exp_avg_scale, part.exp_avg_sq_scale,
                                         part.master ? master : nullptr});
  memcpy(part.param, param, size * sizeof(P));
  memcpy(part.exp_avg, exp_avg, size);
  memcpy(part.exp_avg_sq, exp_avg_sq, size);
  if (part.master) memcpy(part.master, master, size * sizeof(float));
}

template <bool kFromGrad, class P, class G>
void update_run(const AdamWShared& shared, const AdamW8bitTensor& t, int64_t begin, int64_t end) {
  for (int64_t at = begin; at < end; at += kBlock) {
    const int64_t number = at / kBlock;
    const Block<P, G> block = {static_cast<P*>(t.param) + at,
                               static_cast<const G*>(t.grad) + at,
                               t.exp_avg + at,
                               t.exp_avg_sq + at,
                               t.exp_avg_scale + number,
                               t.exp_avg_sq_scale + number,
                               t.master ? t.master + at : nullptr};
    if (end - at >= kBlock)
      update_block<kFromGrad>(shared, block);
    else
      update_part<kFromGrad>(shared, block, end - at);
  }
}

}  // namespace

void adamw_8bit(const AdamW8bit& args) {
  const TensorList<AdamW8bitTensor> list(args.tensors, args.num_tensors, kBlock);
  const AdamWShared shared(args);
  with_type(args.param_dtype, [&](auto param) {
    with_type(args.grad_dtype, [&](auto grad) {
      list.for_each_run(grain_of(kBlock * 16), [&](const AdamW8bitTensor& tensor, int64_t begin, int64_t end, int64_t) {
        auto* run = shared.from_grad ? update_run<true, decltype(param), decltype(grad)>
                                     : update_run<false, decltype(param), decltype(grad)>;
        run(shared, tensor, begin, end);
      });
    });
  });
}

}  // namespace llmsys::cpu::LLMSYS_ISA

LLMSYS_DISPATCH(adamw_8bit, AdamW8bit)
