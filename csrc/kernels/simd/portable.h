// simd.h without any instruction set: arrays. The reference of the other paths, and the meaning of every operation.
#pragma once

// Included by simd.h alone, which declares TM_INLINE, TM_ISA and the scalar conversions.
namespace tokenmill::TM_ISA {

// Calls, not copies: sixteen-element loops inlined into every unrolled kernel would take minutes to compile.
#define TM_OUTLINE inline __attribute__((noinline))

struct F32x16 { float v[16]; };
struct I32x16 { int32_t v[16]; };
struct U8x64 { uint8_t v[64]; };

#define TM_EACH(TYPE, EXPRESSION)                   \
  TYPE r;                                           \
  for (int i = 0; i < 16; ++i) r.v[i] = EXPRESSION; \
  return r

TM_OUTLINE F32x16 zero_f32() { TM_EACH(F32x16, 0.0f); }
TM_OUTLINE F32x16 set1(float x) { TM_EACH(F32x16, x); }
TM_OUTLINE F32x16 load(const float* p) { TM_EACH(F32x16, p[i]); }
TM_OUTLINE void store(float* p, F32x16 x) { for (int i = 0; i < 16; ++i) p[i] = x.v[i]; }
TM_OUTLINE F32x16 load_first(const float* p, int n) { TM_EACH(F32x16, i < n ? p[i] : 0.0f); }
TM_OUTLINE void store_first(float* p, F32x16 x, int n) { for (int i = 0; i < n; ++i) p[i] = x.v[i]; }
TM_OUTLINE F32x16 keep_first(F32x16 x, int n, F32x16 other) { TM_EACH(F32x16, i < n ? x.v[i] : other.v[i]); }
TM_OUTLINE F32x16 add(F32x16 a, F32x16 b) { TM_EACH(F32x16, a.v[i] + b.v[i]); }
TM_OUTLINE F32x16 sub(F32x16 a, F32x16 b) { TM_EACH(F32x16, a.v[i] - b.v[i]); }
TM_OUTLINE F32x16 mul(F32x16 a, F32x16 b) { TM_EACH(F32x16, a.v[i] * b.v[i]); }
TM_OUTLINE F32x16 div(F32x16 a, F32x16 b) { TM_EACH(F32x16, a.v[i] / b.v[i]); }
TM_OUTLINE F32x16 fma(F32x16 a, F32x16 b, F32x16 c) { TM_EACH(F32x16, fma1(a.v[i], b.v[i], c.v[i])); }
TM_OUTLINE F32x16 max(F32x16 a, F32x16 b) { TM_EACH(F32x16, a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
TM_OUTLINE F32x16 min(F32x16 a, F32x16 b) { TM_EACH(F32x16, a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
TM_OUTLINE F32x16 abs(F32x16 a) { TM_EACH(F32x16, __builtin_fabsf(a.v[i])); }
TM_OUTLINE F32x16 sqrt(F32x16 a) { TM_EACH(F32x16, __builtin_sqrtf(a.v[i])); }
TM_OUTLINE F32x16 select_less(F32x16 a, F32x16 b, F32x16 x, F32x16 y) { TM_EACH(F32x16, a.v[i] < b.v[i] ? x.v[i] : y.v[i]); }
TM_OUTLINE uint32_t less_bits(F32x16 a, F32x16 b) {
  uint32_t bits = 0;
  for (int i = 0; i < 16; ++i) bits |= static_cast<uint32_t>(a.v[i] < b.v[i]) << i;
  return bits;
}
// Exact below 2^22 in magnitude; every caller rounds values far smaller than that.
TM_OUTLINE F32x16 round_even(F32x16 a) { TM_EACH(F32x16, __builtin_copysignf((a.v[i] + 12582912.0f) - 12582912.0f, a.v[i])); }
TM_OUTLINE I32x16 to_i32(F32x16 a) {
  const F32x16 whole = round_even(a);
  TM_EACH(I32x16, static_cast<int32_t>(whole.v[i]));
}
TM_OUTLINE F32x16 to_f32(I32x16 a) { TM_EACH(F32x16, static_cast<float>(a.v[i])); }
TM_OUTLINE F32x16 bits_as_f32(I32x16 a) { TM_EACH(F32x16, bits_to_f32(static_cast<uint32_t>(a.v[i]))); }
TM_OUTLINE F32x16 scale_by_power(F32x16 p, F32x16 n) {
  TM_EACH(F32x16, n.v[i] >= -126.0f && n.v[i] <= 127.0f
                      ? p.v[i] * bits_to_f32(static_cast<uint32_t>(static_cast<int32_t>(n.v[i]) + 127) << 23)
                      : p.v[i]);
}
TM_OUTLINE I32x16 zero_i32() { TM_EACH(I32x16, 0); }
TM_OUTLINE I32x16 set1_i32(int32_t x) { TM_EACH(I32x16, x); }
TM_OUTLINE I32x16 load(const int32_t* p) { TM_EACH(I32x16, p[i]); }
TM_OUTLINE void store(int32_t* p, I32x16 x) { for (int i = 0; i < 16; ++i) p[i] = x.v[i]; }
TM_OUTLINE I32x16 add(I32x16 a, I32x16 b) { TM_EACH(I32x16, a.v[i] + b.v[i]); }
TM_OUTLINE I32x16 sub(I32x16 a, I32x16 b) { TM_EACH(I32x16, a.v[i] - b.v[i]); }
TM_OUTLINE I32x16 mul(I32x16 a, I32x16 b) { TM_EACH(I32x16, a.v[i] * b.v[i]); }
template <int kBits> TM_OUTLINE I32x16 shift_left(I32x16 a) { TM_EACH(I32x16, static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) << kBits)); }
TM_OUTLINE F32x16 load_f16(const uint16_t* p) { TM_EACH(F32x16, f16_to_f32(p[i])); }
TM_OUTLINE F32x16 load_bf16(const uint16_t* p) { TM_EACH(F32x16, bf16_to_f32(p[i])); }
TM_OUTLINE void store_f16(uint16_t* p, F32x16 x) { for (int i = 0; i < 16; ++i) p[i] = f32_to_f16(x.v[i]); }
TM_OUTLINE I32x16 load_i8_as_i32(const int8_t* p) { TM_EACH(I32x16, p[i]); }
TM_OUTLINE I32x16 load_u8_as_i32(const uint8_t* p) { TM_EACH(I32x16, p[i]); }
TM_OUTLINE I32x16 bits_as_i32(F32x16 a) { TM_EACH(I32x16, static_cast<int32_t>(f32_to_bits(a.v[i]))); }
TM_OUTLINE I32x16 bit_and(I32x16 a, I32x16 b) { TM_EACH(I32x16, a.v[i] & b.v[i]); }
TM_OUTLINE I32x16 max(I32x16 a, I32x16 b) { TM_EACH(I32x16, a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
TM_OUTLINE int32_t reduce_max(I32x16 a) {
  int32_t r = a.v[0];
  for (int i = 1; i < 16; ++i) r = a.v[i] > r ? a.v[i] : r;
  return r;
}
TM_OUTLINE int32_t reduce_add(I32x16 a) {
  int32_t r = 0;
  for (int i = 0; i < 16; ++i) r += a.v[i];
  return r;
}
TM_OUTLINE I32x16 reduce_max_each(const I32x16 (&v)[16]) { TM_EACH(I32x16, reduce_max(v[i])); }
TM_OUTLINE I32x16 add_pairs(I32x16 a, I32x16 b) { TM_EACH(I32x16, i < 8 ? a.v[2 * i] + a.v[2 * i + 1] : b.v[2 * i - 16] + b.v[2 * i - 15]); }
TM_OUTLINE I32x16 load_u8_as_i16_pairs(const uint8_t* p) { TM_EACH(I32x16, p[2 * i] | (p[2 * i + 1] << 16)); }
TM_OUTLINE void load_bf16_pairs(const void* p, F32x16& even, F32x16& odd) {
  uint16_t pairs[32];
  memcpy(pairs, p, 64);
  for (int i = 0; i < 16; ++i) even.v[i] = bf16_to_f32(pairs[2 * i]);
  for (int i = 0; i < 16; ++i) odd.v[i] = bf16_to_f32(pairs[2 * i + 1]);
}
TM_OUTLINE void load_f16_pairs(const void* p, F32x16& even, F32x16& odd) {
  uint16_t pairs[32];
  memcpy(pairs, p, 64);
  for (int i = 0; i < 16; ++i) even.v[i] = f16_to_f32(pairs[2 * i]);
  for (int i = 0; i < 16; ++i) odd.v[i] = f16_to_f32(pairs[2 * i + 1]);
}

TM_OUTLINE U8x64 load_u8x64(const void* p) { U8x64 r; memcpy(r.v, p, 64); return r; }
TM_OUTLINE void store_u8x64(void* p, U8x64 x) { memcpy(p, x.v, 64); }
TM_OUTLINE U8x64 set1_u8(uint8_t x) { U8x64 r; memset(r.v, x, 64); return r; }
TM_OUTLINE U8x64 bit_and(U8x64 a, U8x64 b) { for (int i = 0; i < 64; ++i) a.v[i] &= b.v[i]; return a; }
TM_OUTLINE U8x64 bit_or(U8x64 a, U8x64 b) { for (int i = 0; i < 64; ++i) a.v[i] |= b.v[i]; return a; }
TM_OUTLINE U8x64 bit_xor(U8x64 a, U8x64 b) { for (int i = 0; i < 64; ++i) a.v[i] ^= b.v[i]; return a; }
template <int kBits> TM_OUTLINE U8x64 shift_right_u16(U8x64 a) {
  uint16_t w[32];
  memcpy(w, a.v, 64);
  for (int i = 0; i < 32; ++i) w[i] = static_cast<uint16_t>(w[i] >> kBits);
  memcpy(a.v, w, 64);
  return a;
}
template <int kBits> TM_OUTLINE U8x64 shift_left_u16(U8x64 a) {
  uint16_t w[32];
  memcpy(w, a.v, 64);
  for (int i = 0; i < 32; ++i) w[i] = static_cast<uint16_t>(w[i] << kBits);
  memcpy(a.v, w, 64);
  return a;
}
TM_OUTLINE U8x64 narrow_to_i8(I32x16 a, I32x16 b, I32x16 c, I32x16 d) {
  U8x64 r;
  for (int i = 0; i < 16; ++i) {
    r.v[i] = static_cast<uint8_t>(a.v[i]);
    r.v[16 + i] = static_cast<uint8_t>(b.v[i]);
    r.v[32 + i] = static_cast<uint8_t>(c.v[i]);
    r.v[48 + i] = static_cast<uint8_t>(d.v[i]);
  }
  return r;
}
TM_OUTLINE U8x64 abs_i8(U8x64 a) {
  for (uint8_t& byte : a.v) byte = byte < 128 ? byte : static_cast<uint8_t>(256 - byte);
  return a;
}
TM_OUTLINE I32x16 sums_of_16(const U8x64 (&codes)[4]) {
  I32x16 r = zero_i32();
  for (int i = 0; i < 256; ++i) r.v[i / 16] += static_cast<int8_t>(codes[i / 64].v[i % 64]);
  return r;
}
TM_OUTLINE U8x64 lookup16(const uint8_t* table, U8x64 index) { for (int i = 0; i < 64; ++i) index.v[i] = table[index.v[i] & 15]; return index; }

template <int kCodeBits>
TM_OUTLINE I32x16 dot4(I32x16 acc, U8x64 w, int32_t quad) {
  int8_t a[4];
  memcpy(a, &quad, 4);
  for (int i = 0; i < 16; ++i) {
    acc.v[i] += w.v[4 * i] * a[0] + w.v[4 * i + 1] * a[1] + w.v[4 * i + 2] * a[2] + w.v[4 * i + 3] * a[3];
  }
  return acc;
}

TM_OUTLINE I32x16 dot2(I32x16 acc, I32x16 w, int32_t pair) {
  const int32_t a0 = static_cast<int16_t>(pair), a1 = pair >> 16;
  for (int i = 0; i < 16; ++i) acc.v[i] += static_cast<int16_t>(w.v[i]) * a0 + (w.v[i] >> 16) * a1;
  return acc;
}

TM_OUTLINE I32x16 as_multiplier(I32x16 b) { return b; }
TM_OUTLINE I32x16 multiply_add_i32(I32x16 acc, I32x16 a, I32x16 b) { TM_EACH(I32x16, acc.v[i] + a.v[i] * b.v[i]); }

template <int kBy> TM_OUTLINE F32x16 lanes_down(F32x16 a) { TM_EACH(F32x16, i + kBy < 16 ? a.v[i + kBy] : 0.0f); }
TM_OUTLINE float first_lane(F32x16 a) { return a.v[0]; }

TM_OUTLINE void prefetch(const void* p) { __builtin_prefetch(p); }

#undef TM_EACH
#undef TM_OUTLINE

}  // namespace tokenmill::TM_ISA
