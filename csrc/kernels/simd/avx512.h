// simd.h on AVX-512 F, BW, DQ and VL, with VNNI or without: one register.
#pragma once

// Included by simd.h alone, which declares TM_INLINE, TM_ISA and the scalar conversions.
namespace tokenmill::TM_ISA {

struct F32x16 { __m512 v; };
struct I32x16 { __m512i v; };
struct U8x64 { __m512i v; };

TM_INLINE F32x16 zero_f32() { return {_mm512_setzero_ps()}; }
TM_INLINE F32x16 set1(float x) { return {_mm512_set1_ps(x)}; }
TM_INLINE F32x16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
TM_INLINE void store(float* p, F32x16 x) { _mm512_storeu_ps(p, x.v); }
TM_INLINE __mmask16 first_lanes(int n) { return static_cast<__mmask16>((1U << n) - 1U); }
// n in 0..16; the other lanes are zero and their memory is not touched.
TM_INLINE F32x16 load_first(const float* p, int n) { return {_mm512_maskz_loadu_ps(first_lanes(n), p)}; }
TM_INLINE void store_first(float* p, F32x16 x, int n) { _mm512_mask_storeu_ps(p, first_lanes(n), x.v); }
// Lanes n.. of x replaced by `other`.
TM_INLINE F32x16 keep_first(F32x16 x, int n, F32x16 other) { return {_mm512_mask_blend_ps(first_lanes(n), other.v, x.v)}; }
TM_INLINE F32x16 add(F32x16 a, F32x16 b) { return {_mm512_add_ps(a.v, b.v)}; }
TM_INLINE F32x16 sub(F32x16 a, F32x16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
TM_INLINE F32x16 mul(F32x16 a, F32x16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
TM_INLINE F32x16 div(F32x16 a, F32x16 b) { return {_mm512_div_ps(a.v, b.v)}; }
TM_INLINE F32x16 fma(F32x16 a, F32x16 b, F32x16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// a > b ? a : b lane by lane; the second operand if either is NaN (all paths agree).
TM_INLINE F32x16 max(F32x16 a, F32x16 b) { return {_mm512_max_ps(a.v, b.v)}; }
TM_INLINE F32x16 min(F32x16 a, F32x16 b) { return {_mm512_min_ps(a.v, b.v)}; }
TM_INLINE F32x16 abs(F32x16 a) { return {_mm512_abs_ps(a.v)}; }
TM_INLINE F32x16 sqrt(F32x16 a) { return {_mm512_sqrt_ps(a.v)}; }
// a < b ? x : y lane by lane (false for NaN).
TM_INLINE F32x16 select_less(F32x16 a, F32x16 b, F32x16 x, F32x16 y) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), y.v, x.v)};
}
// Bit i says whether a < b in lane i (false for NaN).
TM_INLINE uint32_t less_bits(F32x16 a, F32x16 b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ); }
TM_INLINE F32x16 round_even(F32x16 a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
// The nearest whole numbers, ties to even; they must fit int32.
TM_INLINE I32x16 to_i32(F32x16 a) { return {_mm512_cvtps_epi32(a.v)}; }
TM_INLINE F32x16 to_f32(I32x16 a) { return {_mm512_cvtepi32_ps(a.v)}; }
TM_INLINE F32x16 bits_as_f32(I32x16 a) { return {_mm512_castsi512_ps(a.v)}; }
// p * 2^n for whole n in -126..127 and p in 0.5..2; where n is NaN or lies outside, anything.
TM_INLINE F32x16 scale_by_power(F32x16 p, F32x16 n) { return {_mm512_scalef_ps(p.v, n.v)}; }
TM_INLINE I32x16 zero_i32() { return {_mm512_setzero_si512()}; }
TM_INLINE I32x16 set1_i32(int32_t x) { return {_mm512_set1_epi32(x)}; }
TM_INLINE I32x16 load(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
TM_INLINE void store(int32_t* p, I32x16 x) { _mm512_storeu_si512(p, x.v); }
TM_INLINE I32x16 add(I32x16 a, I32x16 b) { return {_mm512_add_epi32(a.v, b.v)}; }
TM_INLINE I32x16 sub(I32x16 a, I32x16 b) { return {_mm512_sub_epi32(a.v, b.v)}; }
TM_INLINE I32x16 mul(I32x16 a, I32x16 b) { return {_mm512_mullo_epi32(a.v, b.v)}; }
template <int kBits> TM_INLINE I32x16 shift_left(I32x16 a) { return {_mm512_slli_epi32(a.v, kBits)}; }
TM_INLINE F32x16 load_f16(const uint16_t* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))}; }
TM_INLINE F32x16 load_bf16(const uint16_t* p) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16))};
}
TM_INLINE void store_f16(uint16_t* p, F32x16 x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
TM_INLINE I32x16 load_i8_as_i32(const int8_t* p) { return {_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))}; }
TM_INLINE I32x16 load_u8_as_i32(const uint8_t* p) { return {_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))}; }
// Bits of a, unchanged.
TM_INLINE I32x16 bits_as_i32(F32x16 a) { return {_mm512_castps_si512(a.v)}; }
TM_INLINE I32x16 bit_and(I32x16 a, I32x16 b) { return {_mm512_and_si512(a.v, b.v)}; }
TM_INLINE I32x16 max(I32x16 a, I32x16 b) { return {_mm512_max_epi32(a.v, b.v)}; }
TM_INLINE int32_t reduce_max(I32x16 a) { return _mm512_reduce_max_epi32(a.v); }
TM_INLINE int32_t reduce_add(I32x16 a) { return _mm512_reduce_add_epi32(a.v); }
// Lane i: the largest lane of v[i].
TM_INLINE I32x16 reduce_max_each(const I32x16 (&v)[16]) {
  const auto fours = [](const I32x16* x) {  // lane 4 l + i of the result: the largest of lanes 4 l .. 4 l + 3 of x[i]
    const __m512i a = _mm512_max_epi32(_mm512_unpacklo_epi32(x[0].v, x[1].v), _mm512_unpackhi_epi32(x[0].v, x[1].v));
    const __m512i b = _mm512_max_epi32(_mm512_unpacklo_epi32(x[2].v, x[3].v), _mm512_unpackhi_epi32(x[2].v, x[3].v));
    return _mm512_max_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
  };
  const auto halves = [](__m512i a, __m512i b) {
    return _mm512_max_epi32(_mm512_shuffle_i32x4(a, b, 0x44), _mm512_shuffle_i32x4(a, b, 0xee));
  };
  const __m512i low = halves(fours(v), fours(v + 4)), high = halves(fours(v + 8), fours(v + 12));
  return {_mm512_max_epi32(_mm512_shuffle_i32x4(low, high, 0x88), _mm512_shuffle_i32x4(low, high, 0xdd))};
}
// a0 + a1, a2 + a3 ... a14 + a15, b0 + b1 ... b14 + b15.
TM_INLINE I32x16 add_pairs(I32x16 a, I32x16 b) {
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  return {_mm512_add_epi32(_mm512_permutex2var_epi32(a.v, even, b.v), _mm512_permutex2var_epi32(a.v, odd, b.v))};
}
// 32 bytes -> lanes of two int16: lane r holds bytes 2r (low half) and 2r + 1.
TM_INLINE I32x16 load_u8_as_i16_pairs(const uint8_t* p) { return {_mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))}; }
// 32 16-bit elements: those at even places and those at odd places.
TM_INLINE void load_bf16_pairs(const void* p, F32x16& even, F32x16& odd) {
  const __m512i pairs = _mm512_loadu_si512(p);
  even.v = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
  odd.v = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int32_t>(0xffff0000U))));
}
TM_INLINE void load_f16_pairs(const void* p, F32x16& even, F32x16& odd) {
  const __m512i order = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15));
  const __m512i halves = _mm512_shuffle_epi8(_mm512_loadu_si512(p), order);
  const __m512i sorted = _mm512_permutexvar_epi64(_mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7), halves);
  even.v = _mm512_cvtph_ps(_mm512_castsi512_si256(sorted));
  odd.v = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(sorted, 1));
}

TM_INLINE U8x64 load_u8x64(const void* p) { return {_mm512_loadu_si512(p)}; }
TM_INLINE void store_u8x64(void* p, U8x64 x) { _mm512_storeu_si512(p, x.v); }
TM_INLINE U8x64 set1_u8(uint8_t x) { return {_mm512_set1_epi8(static_cast<char>(x))}; }
TM_INLINE U8x64 bit_and(U8x64 a, U8x64 b) { return {_mm512_and_si512(a.v, b.v)}; }
TM_INLINE U8x64 bit_or(U8x64 a, U8x64 b) { return {_mm512_or_si512(a.v, b.v)}; }
TM_INLINE U8x64 bit_xor(U8x64 a, U8x64 b) { return {_mm512_xor_si512(a.v, b.v)}; }
// Shifts of 16-bit units: bits cross byte borders, so mask afterwards.
template <int kBits> TM_INLINE U8x64 shift_right_u16(U8x64 a) { return {_mm512_srli_epi16(a.v, kBits)}; }
template <int kBits> TM_INLINE U8x64 shift_left_u16(U8x64 a) { return {_mm512_slli_epi16(a.v, kBits)}; }
// a, b, c and d as int8, in order. Values must lie in -128..127.
TM_INLINE U8x64 narrow_to_i8(I32x16 a, I32x16 b, I32x16 c, I32x16 d) {
  const __m512i lanes = _mm512_packs_epi16(_mm512_packs_epi32(a.v, b.v), _mm512_packs_epi32(c.v, d.v));
  return {_mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), lanes)};
}
TM_INLINE U8x64 abs_i8(U8x64 a) { return {_mm512_abs_epi8(a.v)}; }
// Lane i: the sum of int8 codes 16 i .. 16 i + 15 of 256.
TM_INLINE I32x16 sums_of_16(const U8x64 (&codes)[4]) {
  const auto quads = [](U8x64 x) {
    return _mm512_madd_epi16(_mm512_maddubs_epi16(_mm512_set1_epi8(1), x.v), _mm512_set1_epi16(1));
  };
  const __m512i a = quads(codes[0]), b = quads(codes[1]), c = quads(codes[2]), d = quads(codes[3]);
  const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
  const __m512i sums = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
  return {_mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), sums)};
}
// table[index & 15] for every byte; indices must be below 16.
TM_INLINE U8x64 lookup16(const uint8_t* table, U8x64 index) {
  return {_mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table))), index.v)};
}

#if defined(TM_HAS_VNNI)
// As inline assembly: g++ 12 moves the intrinsic's accumulators to the stack when there are 16 and more of them.
template <int kCodeBits>
TM_INLINE I32x16 dot4(I32x16 acc, U8x64 w, int32_t quad) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(acc.v) : "v"(w.v), "v"(_mm512_set1_epi32(quad)));
  return acc;
}
// Broadcast by the instruction that multiplies: one operation of the front end less where a quad meets one vector of codes.
#define TM_HAS_DOT4_FROM
TM_INLINE I32x16 dot4_from(I32x16 acc, U8x64 w, const uint8_t* quad) {
  __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(acc.v) : "v"(w.v), "m"(*reinterpret_cast<const uint8_t(*)[4]>(quad)));
  return acc;
}
#else
#define TM_SUMS_PAIRS
struct I16x32 { __m512i v; };
TM_INLINE I16x32 dot_pairs(U8x64 w, int32_t quad) { return {_mm512_maddubs_epi16(w.v, _mm512_set1_epi32(quad))}; }
// Sums as inline assembly: g++ 12 computes all products of a chain first, onto the stack, and adds them afterwards.
TM_INLINE __m512i plus_i32(__m512i a, __m512i b) {
  __asm__("vpaddd %1, %0, %0" : "+v"(a) : "v"(b));
  return a;
}
TM_INLINE I16x32 add(I16x32 a, I16x32 b) {
  __asm__("vpaddw %1, %0, %0" : "+v"(a.v) : "v"(b.v));
  return a;
}
TM_INLINE I32x16 add_sums_of_pairs(I32x16 acc, I16x32 pairs) {
  return {plus_i32(acc.v, _mm512_madd_epi16(pairs.v, _mm512_set1_epi16(1)))};
}
TM_INLINE I32x16 multiply_add_pairs(I32x16 acc, I16x32 pairs, I32x16 multiplier) {
  return {plus_i32(acc.v, _mm512_madd_epi16(pairs.v, multiplier.v))};
}
template <int kCodeBits>
TM_INLINE I32x16 dot4(I32x16 acc, U8x64 w, int32_t quad) {
  if constexpr (kCodeBits <= 6) {
    return add_sums_of_pairs(acc, dot_pairs(w, quad));
  } else {  // 255 * 127 * 2 overflows int16: even and odd bytes apart
    const __m512i a = _mm512_set1_epi32(quad);
    const __m512i w_even = _mm512_and_si512(w.v, _mm512_set1_epi16(0xff)), w_odd = _mm512_srli_epi16(w.v, 8);
    const __m512i a_even = _mm512_srai_epi16(_mm512_slli_epi16(a, 8), 8), a_odd = _mm512_srai_epi16(a, 8);
    return {plus_i32(plus_i32(acc.v, _mm512_madd_epi16(w_even, a_even)), _mm512_madd_epi16(w_odd, a_odd))};
  }
}
#endif

TM_INLINE I32x16 dot2(I32x16 acc, I32x16 w, int32_t pair) {
  const __m512i a = _mm512_set1_epi32(pair);
#if defined(TM_HAS_VNNI)
  __asm__("vpdpwssd %2, %1, %0" : "+v"(acc.v) : "v"(w.v), "v"(a));
  return acc;
#else
  return {_mm512_add_epi32(acc.v, _mm512_madd_epi16(w.v, a))};
#endif
}

#if defined(TM_HAS_VNNI)
#define TM_HAS_DOT2_FROM
TM_INLINE I32x16 dot2_from(I32x16 acc, I32x16 w, const uint8_t* pair) {
  __asm__("vpdpwssd %2%{1to16%}, %1, %0" : "+v"(acc.v) : "v"(w.v), "m"(*reinterpret_cast<const uint8_t(*)[4]>(pair)));
  return acc;
}
#endif
TM_INLINE I32x16 as_multiplier(I32x16 b) { return {_mm512_and_si512(b.v, _mm512_set1_epi32(0xffff))}; }
#define TM_HAS_MULTIPLY_ADD_I16
TM_INLINE I32x16 multiply_add_i16(I32x16 acc, I32x16 a, I32x16 b) {
#if defined(TM_HAS_VNNI)
  __asm__("vpdpwssd %2, %1, %0" : "+v"(acc.v) : "v"(a.v), "v"(b.v));
  return acc;
#else
  return {plus_i32(acc.v, _mm512_madd_epi16(a.v, b.v))};
#endif
}
TM_INLINE I32x16 multiply_add_i32(I32x16 acc, I32x16 a, I32x16 b) {
  return {_mm512_add_epi32(acc.v, _mm512_mullo_epi32(a.v, _mm512_srai_epi32(_mm512_slli_epi32(b.v, 16), 16)))};
}

// Lane i holds what lane i + kBy held, for i + kBy < 16; kBy is 8, 4, 2 or 1.
template <int kBy> TM_INLINE F32x16 lanes_down(F32x16 a) {
  if constexpr (kBy >= 4) {
    return {_mm512_shuffle_f32x4(a.v, a.v, kBy == 8 ? 0x0e : 0x39)};
  } else {
    return {_mm512_castsi512_ps(_mm512_alignr_epi32(_mm512_castps_si512(a.v), _mm512_castps_si512(a.v), kBy))};
  }
}
TM_INLINE float first_lane(F32x16 a) { return _mm512_cvtss_f32(a.v); }

TM_INLINE void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

}  // namespace tokenmill::TM_ISA
