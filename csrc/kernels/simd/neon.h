// simd.h on Armv8.2 with dot product: four registers.
#pragma once

// Included by simd.h alone, which declares TM_INLINE, TM_ISA and the scalar conversions.
namespace tokenmill::TM_ISA {

struct F32x16 { float32x4_t q0, q1, q2, q3; };
struct I32x16 { int32x4_t q0, q1, q2, q3; };
struct U8x64 { uint8x16_t q0, q1, q2, q3; };

#define TM_UNARY(TYPE, OP) return TYPE{OP(a.q0), OP(a.q1), OP(a.q2), OP(a.q3)}
#define TM_BINARY(TYPE, OP) return TYPE{OP(a.q0, b.q0), OP(a.q1, b.q1), OP(a.q2, b.q2), OP(a.q3, b.q3)}

TM_INLINE F32x16 set1(float x) {
  const float32x4_t q = vdupq_n_f32(x);
  return {q, q, q, q};
}
TM_INLINE F32x16 zero_f32() { return set1(0.0f); }
TM_INLINE F32x16 load(const float* p) { return {vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)}; }
TM_INLINE void store(float* p, F32x16 x) {
  vst1q_f32(p, x.q0);
  vst1q_f32(p + 4, x.q1);
  vst1q_f32(p + 8, x.q2);
  vst1q_f32(p + 12, x.q3);
}
TM_INLINE F32x16 load_first(const float* p, int n) {
  float lanes[16] = {};
  for (int i = 0; i < n; ++i) lanes[i] = p[i];
  return load(lanes);
}
TM_INLINE void store_first(float* p, F32x16 x, int n) {
  float lanes[16];
  store(lanes, x);
  for (int i = 0; i < n; ++i) p[i] = lanes[i];
}
TM_INLINE F32x16 keep_first(F32x16 x, int n, F32x16 other) {
  float lanes[16], others[16];
  store(lanes, x);
  store(others, other);
  for (int i = n; i < 16; ++i) lanes[i] = others[i];
  return load(lanes);
}
TM_INLINE F32x16 add(F32x16 a, F32x16 b) { TM_BINARY(F32x16, vaddq_f32); }
TM_INLINE F32x16 sub(F32x16 a, F32x16 b) { TM_BINARY(F32x16, vsubq_f32); }
TM_INLINE F32x16 mul(F32x16 a, F32x16 b) { TM_BINARY(F32x16, vmulq_f32); }
TM_INLINE F32x16 div(F32x16 a, F32x16 b) { TM_BINARY(F32x16, vdivq_f32); }
TM_INLINE F32x16 fma(F32x16 a, F32x16 b, F32x16 c) {
  return {vfmaq_f32(c.q0, a.q0, b.q0), vfmaq_f32(c.q1, a.q1, b.q1), vfmaq_f32(c.q2, a.q2, b.q2), vfmaq_f32(c.q3, a.q3, b.q3)};
}
// Not vmaxq and vminq: those return NaN if either operand is NaN, and order zeros by sign.
TM_INLINE float32x4_t max4(float32x4_t a, float32x4_t b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
TM_INLINE float32x4_t min4(float32x4_t a, float32x4_t b) { return vbslq_f32(vcltq_f32(a, b), a, b); }
TM_INLINE F32x16 max(F32x16 a, F32x16 b) { TM_BINARY(F32x16, max4); }
TM_INLINE F32x16 min(F32x16 a, F32x16 b) { TM_BINARY(F32x16, min4); }
TM_INLINE F32x16 abs(F32x16 a) { TM_UNARY(F32x16, vabsq_f32); }
TM_INLINE F32x16 sqrt(F32x16 a) { TM_UNARY(F32x16, vsqrtq_f32); }
TM_INLINE F32x16 select_less(F32x16 a, F32x16 b, F32x16 x, F32x16 y) {
  return {vbslq_f32(vcltq_f32(a.q0, b.q0), x.q0, y.q0), vbslq_f32(vcltq_f32(a.q1, b.q1), x.q1, y.q1),
          vbslq_f32(vcltq_f32(a.q2, b.q2), x.q2, y.q2), vbslq_f32(vcltq_f32(a.q3, b.q3), x.q3, y.q3)};
}
TM_INLINE uint32_t less_bits(F32x16 a, F32x16 b) {
  const uint32_t places[4] = {1, 2, 4, 8};
  const uint32x4_t bits = vld1q_u32(places);
  return vaddvq_u32(vandq_u32(vcltq_f32(a.q0, b.q0), bits)) | vaddvq_u32(vandq_u32(vcltq_f32(a.q1, b.q1), bits)) << 4 |
         vaddvq_u32(vandq_u32(vcltq_f32(a.q2, b.q2), bits)) << 8 | vaddvq_u32(vandq_u32(vcltq_f32(a.q3, b.q3), bits)) << 12;
}
TM_INLINE F32x16 round_even(F32x16 a) { TM_UNARY(F32x16, vrndnq_f32); }
TM_INLINE I32x16 to_i32(F32x16 a) { TM_UNARY(I32x16, vcvtnq_s32_f32); }
TM_INLINE F32x16 to_f32(I32x16 a) { TM_UNARY(F32x16, vcvtq_f32_s32); }
TM_INLINE F32x16 bits_as_f32(I32x16 a) { TM_UNARY(F32x16, vreinterpretq_f32_s32); }
TM_INLINE float32x4_t scale_by_power_quarter(float32x4_t p, float32x4_t n) {
  const int32x4_t exponent = vaddq_s32(vcvtnq_s32_f32(n), vdupq_n_s32(127));
  return vmulq_f32(p, vreinterpretq_f32_s32(vshlq_n_s32(exponent, 23)));
}
TM_INLINE F32x16 scale_by_power(F32x16 a, F32x16 b) { TM_BINARY(F32x16, scale_by_power_quarter); }
TM_INLINE I32x16 bits_as_i32(F32x16 a) { TM_UNARY(I32x16, vreinterpretq_s32_f32); }
TM_INLINE I32x16 set1_i32(int32_t x) {
  const int32x4_t q = vdupq_n_s32(x);
  return {q, q, q, q};
}
TM_INLINE I32x16 zero_i32() { return set1_i32(0); }
TM_INLINE I32x16 load(const int32_t* p) { return {vld1q_s32(p), vld1q_s32(p + 4), vld1q_s32(p + 8), vld1q_s32(p + 12)}; }
TM_INLINE void store(int32_t* p, I32x16 x) {
  vst1q_s32(p, x.q0);
  vst1q_s32(p + 4, x.q1);
  vst1q_s32(p + 8, x.q2);
  vst1q_s32(p + 12, x.q3);
}
TM_INLINE I32x16 add(I32x16 a, I32x16 b) { TM_BINARY(I32x16, vaddq_s32); }
TM_INLINE I32x16 sub(I32x16 a, I32x16 b) { TM_BINARY(I32x16, vsubq_s32); }
TM_INLINE I32x16 mul(I32x16 a, I32x16 b) { TM_BINARY(I32x16, vmulq_s32); }
TM_INLINE I32x16 max(I32x16 a, I32x16 b) { TM_BINARY(I32x16, vmaxq_s32); }
TM_INLINE I32x16 bit_and(I32x16 a, I32x16 b) { TM_BINARY(I32x16, vandq_s32); }
TM_INLINE int32_t reduce_max(I32x16 a) { return vmaxvq_s32(vmaxq_s32(vmaxq_s32(a.q0, a.q1), vmaxq_s32(a.q2, a.q3))); }
TM_INLINE int32_t reduce_add(I32x16 a) { return vaddvq_s32(vaddq_s32(vaddq_s32(a.q0, a.q1), vaddq_s32(a.q2, a.q3))); }
TM_INLINE I32x16 reduce_max_each(const I32x16 (&v)[16]) {
  int32_t largest[16];
  for (int i = 0; i < 16; ++i) largest[i] = reduce_max(v[i]);
  return load(largest);
}
TM_INLINE I32x16 add_pairs(I32x16 a, I32x16 b) {
  return {vpaddq_s32(a.q0, a.q1), vpaddq_s32(a.q2, a.q3), vpaddq_s32(b.q0, b.q1), vpaddq_s32(b.q2, b.q3)};
}
template <int kBits> TM_INLINE I32x16 shift_left(I32x16 a) {
  return {vshlq_n_s32(a.q0, kBits), vshlq_n_s32(a.q1, kBits), vshlq_n_s32(a.q2, kBits), vshlq_n_s32(a.q3, kBits)};
}

TM_INLINE float32x4_t f16_to_f32x4(uint16x4_t h) { return vcvt_f32_f16(vreinterpret_f16_u16(h)); }
TM_INLINE F32x16 f16_to_f32x16(uint16x8_t low, uint16x8_t high) {
  return {f16_to_f32x4(vget_low_u16(low)), f16_to_f32x4(vget_high_u16(low)), f16_to_f32x4(vget_low_u16(high)), f16_to_f32x4(vget_high_u16(high))};
}
TM_INLINE F32x16 load_f16(const uint16_t* p) { return f16_to_f32x16(vld1q_u16(p), vld1q_u16(p + 8)); }
TM_INLINE float32x4_t bf16_to_f32x4(const uint16_t* p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }
TM_INLINE F32x16 load_bf16(const uint16_t* p) {
  return {bf16_to_f32x4(p), bf16_to_f32x4(p + 4), bf16_to_f32x4(p + 8), bf16_to_f32x4(p + 12)};
}
TM_INLINE uint16x4_t f32x4_to_f16(float32x4_t x) { return vreinterpret_u16_f16(vcvt_f16_f32(x)); }
TM_INLINE void store_f16(uint16_t* p, F32x16 x) {
  vst1_u16(p, f32x4_to_f16(x.q0));
  vst1_u16(p + 4, f32x4_to_f16(x.q1));
  vst1_u16(p + 8, f32x4_to_f16(x.q2));
  vst1_u16(p + 12, f32x4_to_f16(x.q3));
}
TM_INLINE I32x16 load_i8_as_i32(const int8_t* p) {
  const int8x16_t bytes = vld1q_s8(p);
  const int16x8_t low = vmovl_s8(vget_low_s8(bytes)), high = vmovl_s8(vget_high_s8(bytes));
  return {vmovl_s16(vget_low_s16(low)), vmovl_s16(vget_high_s16(low)), vmovl_s16(vget_low_s16(high)), vmovl_s16(vget_high_s16(high))};
}
TM_INLINE int32x4_t widen_u16(uint16x4_t x) { return vreinterpretq_s32_u32(vmovl_u16(x)); }
TM_INLINE I32x16 load_u8_as_i32(const uint8_t* p) {
  const uint8x16_t bytes = vld1q_u8(p);
  const uint16x8_t low = vmovl_u8(vget_low_u8(bytes)), high = vmovl_u8(vget_high_u8(bytes));
  return {widen_u16(vget_low_u16(low)), widen_u16(vget_high_u16(low)), widen_u16(vget_low_u16(high)), widen_u16(vget_high_u16(high))};
}
TM_INLINE int32x4_t bytes_as_pairs(uint8x8_t x) { return vreinterpretq_s32_u16(vmovl_u8(x)); }
TM_INLINE I32x16 load_u8_as_i16_pairs(const uint8_t* p) {
  return {bytes_as_pairs(vld1_u8(p)), bytes_as_pairs(vld1_u8(p + 8)), bytes_as_pairs(vld1_u8(p + 16)), bytes_as_pairs(vld1_u8(p + 24))};
}
TM_INLINE float32x4_t upper_half(uint32x4_t pairs) { return vreinterpretq_f32_u32(vandq_u32(pairs, vdupq_n_u32(0xffff0000U))); }
TM_INLINE float32x4_t lower_half(uint32x4_t pairs) { return vreinterpretq_f32_u32(vshlq_n_u32(pairs, 16)); }
TM_INLINE void load_bf16_pairs(const void* p, F32x16& even, F32x16& odd) {
  const uint8_t* bytes = static_cast<const uint8_t*>(p);
  const uint32x4_t q0 = vreinterpretq_u32_u8(vld1q_u8(bytes)), q1 = vreinterpretq_u32_u8(vld1q_u8(bytes + 16));
  const uint32x4_t q2 = vreinterpretq_u32_u8(vld1q_u8(bytes + 32)), q3 = vreinterpretq_u32_u8(vld1q_u8(bytes + 48));
  even = {lower_half(q0), lower_half(q1), lower_half(q2), lower_half(q3)};
  odd = {upper_half(q0), upper_half(q1), upper_half(q2), upper_half(q3)};
}
TM_INLINE void load_f16_pairs(const void* p, F32x16& even, F32x16& odd) {
  const uint16x8x2_t low = vld2q_u16(static_cast<const uint16_t*>(p)), high = vld2q_u16(static_cast<const uint16_t*>(p) + 16);
  even = f16_to_f32x16(low.val[0], high.val[0]);
  odd = f16_to_f32x16(low.val[1], high.val[1]);
}

TM_INLINE U8x64 load_u8x64(const void* p) {
  const uint8_t* bytes = static_cast<const uint8_t*>(p);
  return {vld1q_u8(bytes), vld1q_u8(bytes + 16), vld1q_u8(bytes + 32), vld1q_u8(bytes + 48)};
}
TM_INLINE void store_u8x64(void* p, U8x64 x) {
  uint8_t* bytes = static_cast<uint8_t*>(p);
  vst1q_u8(bytes, x.q0);
  vst1q_u8(bytes + 16, x.q1);
  vst1q_u8(bytes + 32, x.q2);
  vst1q_u8(bytes + 48, x.q3);
}
TM_INLINE U8x64 set1_u8(uint8_t x) {
  const uint8x16_t q = vdupq_n_u8(x);
  return {q, q, q, q};
}
TM_INLINE U8x64 bit_and(U8x64 a, U8x64 b) { TM_BINARY(U8x64, vandq_u8); }
TM_INLINE U8x64 bit_or(U8x64 a, U8x64 b) { TM_BINARY(U8x64, vorrq_u8); }
TM_INLINE U8x64 bit_xor(U8x64 a, U8x64 b) { TM_BINARY(U8x64, veorq_u8); }
template <int kBits> TM_INLINE uint8x16_t right_u16(uint8x16_t a) { return vreinterpretq_u8_u16(vshrq_n_u16(vreinterpretq_u16_u8(a), kBits)); }
template <int kBits> TM_INLINE uint8x16_t left_u16(uint8x16_t a) { return vreinterpretq_u8_u16(vshlq_n_u16(vreinterpretq_u16_u8(a), kBits)); }
template <int kBits> TM_INLINE U8x64 shift_right_u16(U8x64 a) { TM_UNARY(U8x64, right_u16<kBits>); }
template <int kBits> TM_INLINE U8x64 shift_left_u16(U8x64 a) { TM_UNARY(U8x64, left_u16<kBits>); }
TM_INLINE uint8x16_t narrow_quarter(I32x16 x) {
  const int16x8_t low = vcombine_s16(vmovn_s32(x.q0), vmovn_s32(x.q1)), high = vcombine_s16(vmovn_s32(x.q2), vmovn_s32(x.q3));
  return vreinterpretq_u8_s8(vcombine_s8(vmovn_s16(low), vmovn_s16(high)));
}
TM_INLINE U8x64 narrow_to_i8(I32x16 a, I32x16 b, I32x16 c, I32x16 d) {
  return {narrow_quarter(a), narrow_quarter(b), narrow_quarter(c), narrow_quarter(d)};
}
TM_INLINE U8x64 abs_i8(U8x64 a) {
  const auto quarter = [](uint8x16_t x) { return vreinterpretq_u8_s8(vabsq_s8(vreinterpretq_s8_u8(x))); };
  return {quarter(a.q0), quarter(a.q1), quarter(a.q2), quarter(a.q3)};
}
TM_INLINE int32x4_t quad_sums(uint8x16_t codes) { return vpaddlq_s16(vpaddlq_s8(vreinterpretq_s8_u8(codes))); }
TM_INLINE int32x4_t sums_of_16_quarter(U8x64 x) {
  return vpaddq_s32(vpaddq_s32(quad_sums(x.q0), quad_sums(x.q1)), vpaddq_s32(quad_sums(x.q2), quad_sums(x.q3)));
}
TM_INLINE I32x16 sums_of_16(const U8x64 (&codes)[4]) {
  return {sums_of_16_quarter(codes[0]), sums_of_16_quarter(codes[1]), sums_of_16_quarter(codes[2]), sums_of_16_quarter(codes[3])};
}
TM_INLINE U8x64 lookup16(const uint8_t* table, U8x64 index) {
  const uint8x16_t t = vld1q_u8(table);
  return {vqtbl1q_u8(t, index.q0), vqtbl1q_u8(t, index.q1), vqtbl1q_u8(t, index.q2), vqtbl1q_u8(t, index.q3)};
}

// The dot product instruction multiplies signed by signed. Codes of up to 6 bits are themselves as int8; others are
// shifted by 128, and 128 * sum(a), as two products with 64, puts back what that took.
template <int kCodeBits>
TM_INLINE int32x4_t dot4_quarter(int32x4_t acc, uint8x16_t w, int8x16_t a) {
  if constexpr (kCodeBits <= 6) {
    return vdotq_s32(acc, vreinterpretq_s8_u8(w), a);
  } else {
    const int8x16_t half_offset = vdupq_n_s8(64);
    acc = vdotq_s32(acc, vreinterpretq_s8_u8(veorq_u8(w, vdupq_n_u8(0x80))), a);
    return vdotq_s32(vdotq_s32(acc, half_offset, a), half_offset, a);
  }
}
template <int kCodeBits>
TM_INLINE I32x16 dot4(I32x16 acc, U8x64 w, int32_t quad) {
  const int8x16_t a = vreinterpretq_s8_s32(vdupq_n_s32(quad));
  return {dot4_quarter<kCodeBits>(acc.q0, w.q0, a), dot4_quarter<kCodeBits>(acc.q1, w.q1, a),
          dot4_quarter<kCodeBits>(acc.q2, w.q2, a), dot4_quarter<kCodeBits>(acc.q3, w.q3, a)};
}
TM_INLINE int32x4_t dot2_quarter(int32x4_t acc, int32x4_t w, int16x4_t a) {
  const int16x8_t pairs = vreinterpretq_s16_s32(w);
  return vaddq_s32(acc, vpaddq_s32(vmull_s16(vget_low_s16(pairs), a), vmull_s16(vget_high_s16(pairs), a)));
}
TM_INLINE I32x16 dot2(I32x16 acc, I32x16 w, int32_t pair) {
  const int16x4_t a = vreinterpret_s16_s32(vdup_n_s32(pair));
  return {dot2_quarter(acc.q0, w.q0, a), dot2_quarter(acc.q1, w.q1, a), dot2_quarter(acc.q2, w.q2, a), dot2_quarter(acc.q3, w.q3, a)};
}

TM_INLINE I32x16 as_multiplier(I32x16 b) { return b; }
TM_INLINE I32x16 multiply_add_i32(I32x16 acc, I32x16 a, I32x16 b) {
  return {vmlaq_s32(acc.q0, a.q0, b.q0), vmlaq_s32(acc.q1, a.q1, b.q1), vmlaq_s32(acc.q2, a.q2, b.q2), vmlaq_s32(acc.q3, a.q3, b.q3)};
}

template <int kBy> TM_INLINE F32x16 lanes_down(F32x16 a) {
  if constexpr (kBy == 8) {
    return {a.q2, a.q3, a.q3, a.q3};
  } else if constexpr (kBy == 4) {
    return {a.q1, a.q2, a.q3, a.q3};
  } else {
    return {vextq_f32(a.q0, a.q1, kBy), vextq_f32(a.q1, a.q2, kBy), vextq_f32(a.q2, a.q3, kBy), vextq_f32(a.q3, a.q3, kBy)};
  }
}
TM_INLINE float first_lane(F32x16 a) { return vgetq_lane_f32(a.q0, 0); }

TM_INLINE void prefetch(const void* p) { __builtin_prefetch(p); }

#undef TM_UNARY
#undef TM_BINARY

}  // namespace tokenmill::TM_ISA
