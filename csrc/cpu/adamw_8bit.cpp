#include "../adamw_8bit.h"

#include "../dynamic_map.h"
#include "dispatch.h"
#include "simd.h"
#include "tensor_list.h"

namespace llmsys::cpu::LLMSYS_ISA {
namespace {

constexpr int kBlock = int(kAdamW8bitBlock);

LLMSYS_INLINE F32 to_f32(U32 x) { return __builtin_convertvector(reinterpret_cast<I32>(x), F32); }
LLMSYS_INLINE I32 to_i32(F32 x) { return __builtin_convertvector(x, I32); }  // towards zero

// step * j + offset, which nearly cancel, so that a rounding of the product would be ten of the sum. The upper 12 bits
// of step times j, of which 10 are in use, are exact.
LLMSYS_INLINE F32 number(F32 step, F32 j, F32 offset) {
#if defined(__FMA__) || LLMSYS_AVX512
  return multiply_add(step, j, offset);
#else
  const F32 high = as_f32(as_u32(step) & 0xfffff000u);
  return (high * j + offset) + (step - high) * j;
#endif
}

LLMSYS_INLINE F32 decode_signed(U32 codes) {
  const F32 j = multiply_add(to_f32(codes), 4.0f, -4.0f * kSignedZero);
  const U32 e = as_u32(j) >> 23, sign = as_u32(j) & 0x80000000u;
  return number(lookup(kSignedMap.step, e), j, as_f32(as_u32(lookup(kSignedMap.offset, e)) ^ sign));
}

LLMSYS_INLINE F32 decode_unsigned(U32 codes) {
  const F32 j = multiply_add(to_f32(codes), 2.0f, 2.0f);
  const U32 e = as_u32(j) >> 23;
  return number(lookup(kUnsignedMap.step, e), j, lookup(kUnsignedMap.offset, e));
}

// Codes of the numbers nearest to `from` * inverse. Step by step, so that no step waits for the one before.
template <bool kSigned>
LLMSYS_INLINE void encode(const float* from, float inverse, uint8_t* codes) {
  constexpr const DynamicMap& map = kSigned ? kSignedMap : kUnsignedMap;
  F32 y[4], x[4];
  U32 e[4], sign[4];
  I32 place[4];
  for (int i = 0; i < 4; ++i) x[i] = load(from + i * kLanes) * inverse;
  for (int i = 0; i < 4; ++i) sign[i] = as_u32(x[i]) & (kSigned ? 0x80000000u : 0u);
  for (int i = 0; i < 4; ++i) y[i] = max(as_f32(as_u32(x[i]) ^ sign[i]), splat(kSmallestQuotient));
  for (int i = 0; i < 4; ++i) e[i] = lookup(map.decade, as_u32(y[i]) >> 24);
  for (int i = 0; i < 4; ++i) e[i] = (e[i] + as_u32(y[i])) >> 24;
  for (int i = 0; i < 4; ++i) x[i] = lookup(map.slope, e[i]);
  for (int i = 0; i < 4; ++i) x[i] = min(multiply_add(x[i], y[i], map.intercept), splat(map.below_two));
  for (int i = 0; i < 4; ++i) x[i] = as_f32((as_u32(x[i]) + (e[i] << 23)) | sign[i]);
  for (int i = 0; i < 4; ++i) place[i] = to_i32(x[i]);
  store_bytes(codes, place, kSigned ? kSignedZero : -1);  // -1 has no code as 1 has: 0, which is nearest
}

// A block's scale, from lanes of the largest bits of its magnitudes: in the order of bits, NaN is above all.
LLMSYS_INLINE float scale_of(U32 largest) {
  uint32_t bits = max_lane(max(largest, splat(0x00800000u)));  // 2^-126, whose inverse is finite
  if (bits >= 0x7f800000u) bits = 0x7fc00000u;
  float scale;
  memcpy(&scale, &bits, sizeof scale);
  return scale;
}

template <bool kSigned>
LLMSYS_INLINE void encode_block(const float* moments, float scale, uint8_t* codes) {
  const float inverse = scale == scale ? 1.0f / scale : 0.0f;  // of NaN: the codes of 0
  for (int at = 0; at < kBlock; at += 4 * kLanes) encode<kSigned>(moments + at, inverse, codes + at);
}

// What all elements share: computed in float64, rounded once.
struct Shared {
  float from_m, from_g, from_v, root_from_square, decay, step_size, eps;

  explicit Shared(const AdamW8bit& args) {
    const double scale = (args.maximize ? -1.0 : 1.0) * (args.grad_scale ? *args.grad_scale : 1.0f);
    from_m = float(args.beta1);
    from_g = float((1.0 - args.beta1) * scale);
    from_v = float(args.beta2);
    root_from_square = float(__builtin_sqrt(1.0 - args.beta2) * scale);
    decay = float(1.0 - args.lr * args.weight_decay);
    // sqrt(bias_correction2) taken out of the denominator: one division an element instead of two.
    const double correction2 = __builtin_sqrt(args.bias_correction2);
    step_size = float(args.lr / args.bias_correction1 * correction2);
    eps = float(args.eps * correction2);
  }
};

template <class P, class G>
struct Block {
  P* param;
  const G* grad;
  uint8_t *exp_avg, *exp_avg_sq;
  float *exp_avg_scale, *exp_avg_sq_scale;
  float* master;
};

template <class P, class G>
LLMSYS_INLINE void update_block(const Shared& shared, const Block<P, G>& block) {
  alignas(64) float ms[kBlock], vs[kBlock];
  const float from_m = shared.from_m * *block.exp_avg_scale, from_v = shared.from_v * *block.exp_avg_sq_scale;
  U32 m_largest = {}, v_largest = {};
  for (int at = 0; at < kBlock; at += 2 * kLanes) {
    F32 p[2];
    for (int i = 0; i < 2; ++i) {
      const int here = at + i * kLanes;
      const F32 g = load(block.grad + here), root = g * shared.root_from_square;
      const F32 m = multiply_add(decode_signed(load(block.exp_avg + here)), from_m, g * shared.from_g);
      const F32 v = multiply_add(decode_unsigned(load(block.exp_avg_sq + here)), from_v, root * root);
      p[i] = block.master ? load(block.master + here) : load(block.param + here);
      p[i] = multiply_add(p[i], shared.decay, -(shared.step_size * m / (sqrt(v) + shared.eps)));
      store(ms + here, m);
      store(vs + here, v);
      m_largest = max(m_largest, as_u32(m) & 0x7fffffffu);
      v_largest = max(v_largest, as_u32(v));  // not negative, but for NaN
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
template <class P, class G>
__attribute__((noinline)) void update_part(const Shared& shared, const Block<P, G>& part, int64_t size) {
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
  update_block<P, G>(shared, {param, grad, exp_avg, exp_avg_sq, part.exp_avg_scale, part.exp_avg_sq_scale,
                              part.master ? master : nullptr});
  memcpy(part.param, param, size * sizeof(P));
  memcpy(part.exp_avg, exp_avg, size);
  memcpy(part.exp_avg_sq, exp_avg_sq, size);
  if (part.master) memcpy(part.master, master, size * sizeof(float));
}

template <class P, class G>
void update_run(const Shared& shared, const AdamW8bitTensor& t, int64_t begin, int64_t end) {
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
      update_block(shared, block);
    else
      update_part(shared, block, end - at);
  }
}

}  // namespace

void adamw_8bit(const AdamW8bit& args) {
  const TensorList<AdamW8bitTensor> list(args.tensors, args.num_tensors, kBlock);
  const Shared shared(args);
  with_type(args.param_dtype, [&](auto param) {
    with_type(args.grad_dtype, [&](auto grad) {
      list.for_each_run(grain_of(kBlock * 16), [&](const AdamW8bitTensor& tensor, int64_t begin, int64_t end, int64_t) {
        update_run<decltype(param), decltype(grad)>(shared, tensor, begin, end);
      });
    });
  });
}

}  // namespace llmsys::cpu::LLMSYS_ISA

LLMSYS_DISPATCH(adamw_8bit, AdamW8bit)
