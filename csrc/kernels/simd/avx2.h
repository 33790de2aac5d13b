// simd.h on AVX2, FMA and F16C, with AVX-VNNI or without: two registers.
#pragma once

// Included by simd.h alone, which declares TM_INLINE, TM_ISA and the scalar conversions.
namespace tokenmill::TM_ISA {

struct F32x16 { __m256 lo, hi; };
struct I32x16 { __m256i lo, hi; };
struct U8x64 { __m256i lo, hi; };

TM_INLINE __m256i load256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
TM_INLINE void store256(void* p, __m256i x) { _mm256_storeu_si256(static_cast<__m256i*>(p), x); }
// All bits set in the lanes below n (n may lie outside of 0..8).
TM_INLINE __m256i first_lanes8(int n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

TM_INLINE F32x16 zero_f32() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
TM_INLINE F32x16 set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
TM_INLINE F32x16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
TM_INLINE void store(float* p, F32x16 x) { _mm256_storeu_ps(p, x.lo); _mm256_storeu_ps(p + 8, x.hi); }
TM_INLINE F32x16 load_first(const float* p, int n) {
  return {_mm256_maskload_ps(p, first_lanes8(n)), _mm256_maskload_ps(p + 8, first_lanes8(n - 8))};
}
TM_INLINE void store_first(float* p, F32x16 x, int n) {
  _mm256_maskstore_ps(p, first_lanes8(n), x.lo);
  _mm256_maskstore_ps(p + 8, first_lanes8(n - 8), x.hi);
}
TM_INLINE F32x16 keep_first(F32x16 x, int n, F32x16 other) {
  return {_mm256_blendv_ps(other.lo, x.lo, _mm256_castsi256_ps(first_lanes8(n))),
          _mm256_blendv_ps(other.hi, x.hi, _mm256_castsi256_ps(first_lanes8(n - 8)))};
}
TM_INLINE F32x16 add(F32x16 a, F32x16 b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
TM_INLINE F32x16 sub(F32x16 a, F32x16 b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
TM_INLINE F32x16 mul(F32x16 a, F32x16 b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
TM_INLINE F32x16 div(F32x16 a, F32x16 b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
TM_INLINE F32x16 fma(F32x16 a, F32x16 b, F32x16 c) { return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)}; }
TM_INLINE F32x16 max(F32x16 a, F32x16 b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
TM_INLINE F32x16 min(F32x16 a, F32x16 b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
TM_INLINE F32x16 abs(F32x16 a) {
  const __m256 mask = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fffffff));
  return {_mm256_and_ps(a.lo, mask), _mm256_and_ps(a.hi, mask)};
}
TM_INLINE F32x16 sqrt(F32x16 a) { return {_mm256_sqrt_ps(a.lo), _mm256_sqrt_ps(a.hi)}; }
TM_INLINE F32x16 select_less(F32x16 a, F32x16 b, F32x16 x, F32x16 y) {
  return {_mm256_blendv_ps(y.lo, x.lo, _mm256_cmp_ps(a.lo, b.lo, _CMP_LT_OQ)),
          _mm256_blendv_ps(y.hi, x.hi, _mm256_cmp_ps(a.hi, b.hi, _CMP_LT_OQ))};
}
TM_INLINE uint32_t less_bits(F32x16 a, F32x16 b) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(a.lo, b.lo, _CMP_LT_OQ)) |
                               _mm256_movemask_ps(_mm256_cmp_ps(a.hi, b.hi, _CMP_LT_OQ)) << 8);
}
TM_INLINE F32x16 round_even(F32x16 a) {
  return {_mm256_round_ps(a.lo, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
          _mm256_round_ps(a.hi, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
TM_INLINE I32x16 to_i32(F32x16 a) { return {_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi)}; }
TM_INLINE F32x16 to_f32(I32x16 a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
TM_INLINE F32x16 bits_as_f32(I32x16 a) { return {_mm256_castsi256_ps(a.lo), _mm256_castsi256_ps(a.hi)}; }
TM_INLINE __m256 scale_by_power_half(__m256 p, __m256 n) {
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return _mm256_mul_ps(p, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
}
TM_INLINE F32x16 scale_by_power(F32x16 p, F32x16 n) { return {scale_by_power_half(p.lo, n.lo), scale_by_power_half(p.hi, n.hi)}; }
TM_INLINE I32x16 zero_i32() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
TM_INLINE I32x16 set1_i32(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
TM_INLINE I32x16 load(const int32_t* p) { return {load256(p), load256(p + 8)}; }
TM_INLINE void store(int32_t* p, I32x16 x) { store256(p, x.lo); store256(p + 8, x.hi); }
TM_INLINE I32x16 add(I32x16 a, I32x16 b) { return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)}; }
TM_INLINE I32x16 sub(I32x16 a, I32x16 b) { return {_mm256_sub_epi32(a.lo, b.lo), _mm256_sub_epi32(a.hi, b.hi)}; }
TM_INLINE I32x16 mul(I32x16 a, I32x16 b) { return {_mm256_mullo_epi32(a.lo, b.lo), _mm256_mullo_epi32(a.hi, b.hi)}; }
template <int kBits> TM_INLINE I32x16 shift_left(I32x16 a) { return {_mm256_slli_epi32(a.lo, kBits), _mm256_slli_epi32(a.hi, kBits)}; }
TM_INLINE F32x16 load_f16(const uint16_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
          _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))};
}
TM_INLINE F32x16 load_bf16(const uint16_t* p) {
  const __m256i lo = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  const __m256i hi = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(lo, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(hi, 16))};
}
TM_INLINE void store_f16(uint16_t* p, F32x16 x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x.lo, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), _mm256_cvtps_ph(x.hi, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
TM_INLINE I32x16 load_i8_as_i32(const int8_t* p) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_cvtepi8_epi32(bytes), _mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8))};
}
TM_INLINE I32x16 load_u8_as_i32(const uint8_t* p) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_cvtepu8_epi32(bytes), _mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8))};
}
TM_INLINE I32x16 bits_as_i32(F32x16 a) { return {_mm256_castps_si256(a.lo), _mm256_castps_si256(a.hi)}; }
TM_INLINE I32x16 bit_and(I32x16 a, I32x16 b) { return {_mm256_and_si256(a.lo, b.lo), _mm256_and_si256(a.hi, b.hi)}; }
TM_INLINE I32x16 max(I32x16 a, I32x16 b) { return {_mm256_max_epi32(a.lo, b.lo), _mm256_max_epi32(a.hi, b.hi)}; }
TM_INLINE int32_t reduce_max(I32x16 a) {
  const __m256i eight = _mm256_max_epi32(a.lo, a.hi);
  const __m128i four = _mm_max_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  const __m128i two = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
}
TM_INLINE int32_t reduce_add(I32x16 a) {
  const __m256i eight = _mm256_add_epi32(a.lo, a.hi);
  const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  const __m128i two = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
}
TM_INLINE I32x16 reduce_max_each(const I32x16 (&v)[16]) {
  alignas(32) int32_t largest[16];
  for (int i = 0; i < 16; ++i) largest[i] = reduce_max(v[i]);
  return load(largest);
}
TM_INLINE I32x16 add_pairs(I32x16 a, I32x16 b) {
  return {_mm256_permute4x64_epi64(_mm256_hadd_epi32(a.lo, a.hi), 0xd8), _mm256_permute4x64_epi64(_mm256_hadd_epi32(b.lo, b.hi), 0xd8)};
}
TM_INLINE I32x16 load_u8_as_i16_pairs(const uint8_t* p) {
  return {_mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
          _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 16)))};
}
TM_INLINE void load_bf16_pairs(const void* p, F32x16& even, F32x16& odd) {
  const __m256i lo = load256(p), hi = load256(static_cast<const char*>(p) + 32);
  const __m256i upper = _mm256_set1_epi32(static_cast<int32_t>(0xffff0000U));
  even = {_mm256_castsi256_ps(_mm256_slli_epi32(lo, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(hi, 16))};
  odd = {_mm256_castsi256_ps(_mm256_and_si256(lo, upper)), _mm256_castsi256_ps(_mm256_and_si256(hi, upper))};
}
TM_INLINE void load_f16_pairs(const void* p, F32x16& even, F32x16& odd) {
  const __m256i order = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15));
  const __m256i lo = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(load256(p), order), 0xd8);
  const __m256i hi = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(load256(static_cast<const char*>(p) + 32), order), 0xd8);
  even = {_mm256_cvtph_ps(_mm256_castsi256_si128(lo)), _mm256_cvtph_ps(_mm256_castsi256_si128(hi))};
  odd = {_mm256_cvtph_ps(_mm256_extracti128_si256(lo, 1)), _mm256_cvtph_ps(_mm256_extracti128_si256(hi, 1))};
}

TM_INLINE U8x64 load_u8x64(const void* p) { return {load256(p), load256(static_cast<const char*>(p) + 32)}; }
TM_INLINE void store_u8x64(void* p, U8x64 x) { store256(p, x.lo); store256(static_cast<char*>(p) + 32, x.hi); }
TM_INLINE U8x64 set1_u8(uint8_t x) { return {_mm256_set1_epi8(static_cast<char>(x)), _mm256_set1_epi8(static_cast<char>(x))}; }
TM_INLINE U8x64 bit_and(U8x64 a, U8x64 b) { return {_mm256_and_si256(a.lo, b.lo), _mm256_and_si256(a.hi, b.hi)}; }
TM_INLINE U8x64 bit_or(U8x64 a, U8x64 b) { return {_mm256_or_si256(a.lo, b.lo), _mm256_or_si256(a.hi, b.hi)}; }
TM_INLINE U8x64 bit_xor(U8x64 a, U8x64 b) { return {_mm256_xor_si256(a.lo, b.lo), _mm256_xor_si256(a.hi, b.hi)}; }
template <int kBits> TM_INLINE U8x64 shift_right_u16(U8x64 a) { return {_mm256_srli_epi16(a.lo, kBits), _mm256_srli_epi16(a.hi, kBits)}; }
template <int kBits> TM_INLINE U8x64 shift_left_u16(U8x64 a) { return {_mm256_slli_epi16(a.lo, kBits), _mm256_slli_epi16(a.hi, kBits)}; }
TM_INLINE __m256i narrow_to_i8_half(I32x16 a, I32x16 b) {
  const __m256i lanes = _mm256_packs_epi16(_mm256_packs_epi32(a.lo, a.hi), _mm256_packs_epi32(b.lo, b.hi));
  return _mm256_permutevar8x32_epi32(lanes, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}
TM_INLINE U8x64 narrow_to_i8(I32x16 a, I32x16 b, I32x16 c, I32x16 d) { return {narrow_to_i8_half(a, b), narrow_to_i8_half(c, d)}; }
TM_INLINE __m256i quad_sums(__m256i codes) {
  return _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_set1_epi8(1), codes), _mm256_set1_epi16(1));
}
TM_INLINE U8x64 abs_i8(U8x64 a) { return {_mm256_abs_epi8(a.lo), _mm256_abs_epi8(a.hi)}; }
// Sums of 16 codes each of two times 64.
TM_INLINE __m256i sums_of_16_half(U8x64 a, U8x64 b) {
  const __m256i pairs = _mm256_hadd_epi32(_mm256_hadd_epi32(quad_sums(a.lo), quad_sums(a.hi)),
                                          _mm256_hadd_epi32(quad_sums(b.lo), quad_sums(b.hi)));
  return _mm256_permutevar8x32_epi32(pairs, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}
TM_INLINE I32x16 sums_of_16(const U8x64 (&codes)[4]) {
  return {sums_of_16_half(codes[0], codes[1]), sums_of_16_half(codes[2], codes[3])};
}
TM_INLINE U8x64 lookup16(const uint8_t* table, U8x64 index) {
  const __m256i t = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)));
  return {_mm256_shuffle_epi8(t, index.lo), _mm256_shuffle_epi8(t, index.hi)};
}

#if defined(TM_HAS_VNNI)
TM_INLINE __m256i dot4_half(__m256i acc, __m256i w, __m256i a) {  // in AVX-VNNI's encoding; a test build has AVX-512's
  __asm__("%{" TM_VNNI_ENCODING "%} vpdpbusd %2, %1, %0" : "+x"(acc) : "x"(w), "x"(a));
  return acc;
}
template <int kCodeBits>
TM_INLINE I32x16 dot4(I32x16 acc, U8x64 w, int32_t quad) {
  const __m256i a = _mm256_set1_epi32(quad);
  return {dot4_half(acc.lo, w.lo, a), dot4_half(acc.hi, w.hi, a)};
}
#else
#define TM_SUMS_PAIRS
struct I16x32 { __m256i lo, hi; };
TM_INLINE I16x32 dot_pairs(U8x64 w, int32_t quad) {
  const __m256i a = _mm256_set1_epi32(quad);
  return {_mm256_maddubs_epi16(w.lo, a), _mm256_maddubs_epi16(w.hi, a)};
}
// Sums as inline assembly: g++ 12 computes all products of a chain first, onto the stack, and adds them afterwards.
TM_INLINE __m256i plus_i32(__m256i a, __m256i b) {
  __asm__("vpaddd %1, %0, %0" : "+x"(a) : "x"(b));
  return a;
}
TM_INLINE __m256i plus_i16(__m256i a, __m256i b) {
  __asm__("vpaddw %1, %0, %0" : "+x"(a) : "x"(b));
  return a;
}
TM_INLINE I16x32 add(I16x32 a, I16x32 b) { return {plus_i16(a.lo, b.lo), plus_i16(a.hi, b.hi)}; }
TM_INLINE I32x16 add_sums_of_pairs(I32x16 acc, I16x32 pairs) {
  const __m256i ones = _mm256_set1_epi16(1);
  return {plus_i32(acc.lo, _mm256_madd_epi16(pairs.lo, ones)), plus_i32(acc.hi, _mm256_madd_epi16(pairs.hi, ones))};
}
TM_INLINE I32x16 multiply_add_pairs(I32x16 acc, I16x32 pairs, I32x16 multiplier) {
  return {plus_i32(acc.lo, _mm256_madd_epi16(pairs.lo, multiplier.lo)), plus_i32(acc.hi, _mm256_madd_epi16(pairs.hi, multiplier.hi))};
}
TM_INLINE __m256i dot4_of_bytes(__m256i acc, __m256i w, __m256i a) {  // 255 * 127 * 2 overflows int16: even and odd bytes apart
  const __m256i w_even = _mm256_and_si256(w, _mm256_set1_epi16(0xff)), w_odd = _mm256_srli_epi16(w, 8);
  const __m256i a_even = _mm256_srai_epi16(_mm256_slli_epi16(a, 8), 8), a_odd = _mm256_srai_epi16(a, 8);
  return plus_i32(plus_i32(acc, _mm256_madd_epi16(w_even, a_even)), _mm256_madd_epi16(w_odd, a_odd));
}
template <int kCodeBits>
TM_INLINE I32x16 dot4(I32x16 acc, U8x64 w, int32_t quad) {
  if constexpr (kCodeBits <= 6) return add_sums_of_pairs(acc, dot_pairs(w, quad));
  const __m256i a = _mm256_set1_epi32(quad);
  return {dot4_of_bytes(acc.lo, w.lo, a), dot4_of_bytes(acc.hi, w.hi, a)};
}
#endif

TM_INLINE __m256i dot2_half(__m256i acc, __m256i w, __m256i a) {
#if defined(TM_HAS_VNNI)
  __asm__("%{" TM_VNNI_ENCODING "%} vpdpwssd %2, %1, %0" : "+x"(acc) : "x"(w), "x"(a));
  return acc;
#else
  return _mm256_add_epi32(acc, _mm256_madd_epi16(w, a));
#endif
}
TM_INLINE I32x16 dot2(I32x16 acc, I32x16 w, int32_t pair) {
  const __m256i a = _mm256_set1_epi32(pair);
  return {dot2_half(acc.lo, w.lo, a), dot2_half(acc.hi, w.hi, a)};
}

TM_INLINE I32x16 as_multiplier(I32x16 b) { return bit_and(b, set1_i32(0xffff)); }
#define TM_HAS_MULTIPLY_ADD_I16
TM_INLINE I32x16 multiply_add_i16(I32x16 acc, I32x16 a, I32x16 b) { return {dot2_half(acc.lo, a.lo, b.lo), dot2_half(acc.hi, a.hi, b.hi)}; }
TM_INLINE I32x16 multiply_add_i32(I32x16 acc, I32x16 a, I32x16 b) {
  const auto extend = [](__m256i x) { return _mm256_srai_epi32(_mm256_slli_epi32(x, 16), 16); };
  return add(acc, mul(a, {extend(b.lo), extend(b.hi)}));
}

template <int kBy> TM_INLINE F32x16 lanes_down(F32x16 a) {
  if constexpr (kBy == 8) return {a.hi, a.hi};
  const __m256 middle = _mm256_permute2f128_ps(a.lo, a.hi, 0x21), top = _mm256_permute2f128_ps(a.hi, a.hi, 0x11);
  if constexpr (kBy == 4) {
    return {middle, top};
  } else {
    const auto down = [](__m256 low, __m256 high) {
      return _mm256_castsi256_ps(_mm256_alignr_epi8(_mm256_castps_si256(high), _mm256_castps_si256(low), 4 * kBy));
    };
    return {down(a.lo, middle), down(a.hi, top)};
  }
}
TM_INLINE float first_lane(F32x16 a) { return _mm256_cvtss_f32(a.lo); }

TM_INLINE void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

}  // namespace tokenmill::TM_ISA
