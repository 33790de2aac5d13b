// Sixteen lanes, the same on every instruction set.
//
// All kernels are written once against F32x16, I32x16 and U8x64. A path maps them to one AVX-512 register, two AVX2
// registers, four NEON registers or an array. Since lane count, operation order and rounding are the same everywhere
// (fma is always fused, nothing is contracted by the compiler), all paths give the same bits, and the portable path is
// the reference of the others.
//
// Rules for code in TM_ISA namespaces: no templates or inline functions of the standard library (their out-of-line
// copies would be compiled for this path and might be linked for all), no global state, no calls into libm except
// sqrtf and fmaf through the wrappers below.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(TM_PATH_AVX512) || defined(TM_PATH_AVX2)
// g++ 12 reports the deliberately undefined pass-through operands inside these intrinsics as uninitialized (bug 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#elif defined(TM_PATH_NEON)
#include <arm_neon.h>
#endif

#ifndef TM_ISA
#error "kernel sources are compiled once per instruction-set path with -DTM_ISA=<path>"
#endif

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)  // instrumented and inlined everywhere, kernels would take many minutes to compile
#define TM_INLINE inline
#else
#define TM_INLINE inline __attribute__((always_inline))
#endif

namespace tokenmill::TM_ISA {

inline constexpr int kLanes = 16;

// ---- scalars -------------------------------------------------------------------------------------------------------

TM_INLINE float fma1(float a, float b, float c) { return __builtin_fmaf(a, b, c); }

TM_INLINE float bits_to_f32(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
TM_INLINE uint32_t f32_to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

TM_INLINE float bf16_to_f32(uint16_t h) { return bits_to_f32(static_cast<uint32_t>(h) << 16); }

// Round to nearest even; NaN stays NaN (quiet).
TM_INLINE uint16_t f32_to_bf16(float value) {
  const uint32_t bits = f32_to_bits(value);
  if ((bits & 0x7fffffffU) > 0x7f800000U) return static_cast<uint16_t>((bits >> 16) | 0x40U);
  return static_cast<uint16_t>((bits + 0x7fffU + ((bits >> 16) & 1U)) >> 16);
}

// IEEE binary16 in integer arithmetic: exact for subnormals, infinities and NaN.
TM_INLINE float f16_to_f32(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000U) << 16;
  const uint32_t magnitude = h & 0x7fffU;
  if (magnitude >= 0x7c00U) return bits_to_f32(sign | 0x7f800000U | ((magnitude & 0x3ffU) << 13) | ((magnitude & 0x3ffU) ? 0x400000U : 0));
  if (magnitude < 0x400U) {  // subnormal: magnitude * 2^-24, exact
    const float value = static_cast<float>(static_cast<int32_t>(magnitude)) * 0x1p-24f;
    return bits_to_f32(f32_to_bits(value) | sign);
  }
  return bits_to_f32(sign | ((magnitude + 0x1c000U) << 13));
}

TM_INLINE uint16_t f32_to_f16(float value) {
  const uint32_t bits = f32_to_bits(value);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000U);
  const uint32_t magnitude = bits & 0x7fffffffU;
  if (magnitude > 0x7f800000U) return static_cast<uint16_t>(sign | 0x7e00U | ((magnitude >> 13) & 0x3ffU));
  if (magnitude >= 0x477ff000U) return static_cast<uint16_t>(sign | 0x7c00U);  // rounds to infinity
  if (magnitude < 0x38800000U) {  // subnormal result: adding 0.5 rounds to a multiple of 2^-24
    const uint32_t rounded = f32_to_bits(bits_to_f32(magnitude) + 0.5f) - 0x3f000000U;
    return static_cast<uint16_t>(sign | rounded);
  }
  return static_cast<uint16_t>(sign | ((magnitude - 0x38000000U + 0xfffU + ((magnitude >> 13) & 1U)) >> 13));
}

// ---- AVX-512 -------------------------------------------------------------------------------------------------------
#if defined(TM_PATH_AVX512)

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
TM_INLINE F32x16 round_even(F32x16 a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
// Values must be whole and fit int32.
TM_INLINE I32x16 to_i32(F32x16 a) { return {_mm512_cvtps_epi32(a.v)}; }
TM_INLINE F32x16 to_f32(I32x16 a) { return {_mm512_cvtepi32_ps(a.v)}; }
TM_INLINE F32x16 bits_as_f32(I32x16 a) { return {_mm512_castsi512_ps(a.v)}; }
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
// Values must lie in -128..127.
TM_INLINE void store_as_i8(int8_t* p, I32x16 x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(x.v)); }
// Bits of a, unchanged.
TM_INLINE I32x16 bits_as_i32(F32x16 a) { return {_mm512_castps_si512(a.v)}; }
TM_INLINE I32x16 bit_and(I32x16 a, I32x16 b) { return {_mm512_and_si512(a.v, b.v)}; }
TM_INLINE I32x16 max(I32x16 a, I32x16 b) { return {_mm512_max_epi32(a.v, b.v)}; }
TM_INLINE int32_t reduce_max(I32x16 a) { return _mm512_reduce_max_epi32(a.v); }
TM_INLINE int32_t reduce_add(I32x16 a) { return _mm512_reduce_add_epi32(a.v); }
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
// table[index & 15] for every byte; indices must be below 16.
TM_INLINE U8x64 lookup16(const uint8_t* table, U8x64 index) {
  return {_mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table))), index.v)};
}

// acc[lane] += sum over i of w[4 lane + i] * a[i], exact. `quad` holds four int8 activations in -127..127.
// kCodeBits says how many bits the unsigned codes use: up to 6 take the short way where there is no VNNI.
template <int kCodeBits>
TM_INLINE I32x16 dot4(I32x16 acc, U8x64 w, int32_t quad) {
  const __m512i a = _mm512_set1_epi32(quad);
#if defined(TM_HAS_VNNI)
  // As inline assembly: g++ 12 moves the intrinsic's accumulators to the stack when there are 16 and more of them.
  __asm__("vpdpbusd %2, %1, %0" : "+v"(acc.v) : "v"(w.v), "v"(a));
  return acc;
#else
  if constexpr (kCodeBits <= 6) {
    return {_mm512_add_epi32(acc.v, _mm512_madd_epi16(_mm512_maddubs_epi16(w.v, a), _mm512_set1_epi16(1)))};
  } else {  // 255 * 127 * 2 overflows int16: even and odd bytes apart
    const __m512i w_even = _mm512_and_si512(w.v, _mm512_set1_epi16(0xff)), w_odd = _mm512_srli_epi16(w.v, 8);
    const __m512i a_even = _mm512_srai_epi16(_mm512_slli_epi16(a, 8), 8), a_odd = _mm512_srai_epi16(a, 8);
    acc.v = _mm512_add_epi32(acc.v, _mm512_madd_epi16(w_even, a_even));
    return {_mm512_add_epi32(acc.v, _mm512_madd_epi16(w_odd, a_odd))};
  }
#endif
}

// acc[lane] += w[2 lane] * a[0] + w[2 lane + 1] * a[1] on int16 pairs; exact where the sums fit int32.
TM_INLINE I32x16 dot2(I32x16 acc, I32x16 w, int32_t pair) {
  const __m512i a = _mm512_set1_epi32(pair);
#if defined(TM_HAS_VNNI)
  __asm__("vpdpwssd %2, %1, %0" : "+v"(acc.v) : "v"(w.v), "v"(a));
  return acc;
#else
  return {_mm512_add_epi32(acc.v, _mm512_madd_epi16(w.v, a))};
#endif
}

TM_INLINE void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

// ---- AVX2 ----------------------------------------------------------------------------------------------------------
#elif defined(TM_PATH_AVX2)

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
TM_INLINE F32x16 round_even(F32x16 a) {
  return {_mm256_round_ps(a.lo, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
          _mm256_round_ps(a.hi, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
TM_INLINE I32x16 to_i32(F32x16 a) { return {_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi)}; }
TM_INLINE F32x16 to_f32(I32x16 a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
TM_INLINE F32x16 bits_as_f32(I32x16 a) { return {_mm256_castsi256_ps(a.lo), _mm256_castsi256_ps(a.hi)}; }
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
TM_INLINE void store_as_i8(int8_t* p, I32x16 x) {
  const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(x.lo, x.hi), 0xd8);
  const __m256i bytes = _mm256_permute4x64_epi64(_mm256_packs_epi16(words, words), 0xd8);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(bytes));
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
TM_INLINE U8x64 lookup16(const uint8_t* table, U8x64 index) {
  const __m256i t = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)));
  return {_mm256_shuffle_epi8(t, index.lo), _mm256_shuffle_epi8(t, index.hi)};
}

template <int kCodeBits>
TM_INLINE __m256i dot4_half(__m256i acc, __m256i w, __m256i a) {
#if defined(TM_HAS_VNNI)  // in AVX-VNNI's encoding; a test build has AVX-512's
  __asm__("%{" TM_VNNI_ENCODING "%} vpdpbusd %2, %1, %0" : "+x"(acc) : "x"(w), "x"(a));
  return acc;
#else
  if constexpr (kCodeBits <= 6) {
    return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(w, a), _mm256_set1_epi16(1)));
  } else {
    const __m256i w_even = _mm256_and_si256(w, _mm256_set1_epi16(0xff)), w_odd = _mm256_srli_epi16(w, 8);
    const __m256i a_even = _mm256_srai_epi16(_mm256_slli_epi16(a, 8), 8), a_odd = _mm256_srai_epi16(a, 8);
    acc = _mm256_add_epi32(acc, _mm256_madd_epi16(w_even, a_even));
    return _mm256_add_epi32(acc, _mm256_madd_epi16(w_odd, a_odd));
  }
#endif
}
template <int kCodeBits>
TM_INLINE I32x16 dot4(I32x16 acc, U8x64 w, int32_t quad) {
  const __m256i a = _mm256_set1_epi32(quad);
  return {dot4_half<kCodeBits>(acc.lo, w.lo, a), dot4_half<kCodeBits>(acc.hi, w.hi, a)};
}

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

TM_INLINE void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

// ---- NEON ----------------------------------------------------------------------------------------------------------
#elif defined(TM_PATH_NEON)

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
TM_INLINE F32x16 round_even(F32x16 a) { TM_UNARY(F32x16, vrndnq_f32); }
TM_INLINE I32x16 to_i32(F32x16 a) { TM_UNARY(I32x16, vcvtnq_s32_f32); }
TM_INLINE F32x16 to_f32(I32x16 a) { TM_UNARY(F32x16, vcvtq_f32_s32); }
TM_INLINE F32x16 bits_as_f32(I32x16 a) { TM_UNARY(F32x16, vreinterpretq_f32_s32); }
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
TM_INLINE void store_as_i8(int8_t* p, I32x16 x) {
  const int16x8_t low = vcombine_s16(vmovn_s32(x.q0), vmovn_s32(x.q1)), high = vcombine_s16(vmovn_s32(x.q2), vmovn_s32(x.q3));
  vst1q_s8(p, vcombine_s8(vmovn_s16(low), vmovn_s16(high)));
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

TM_INLINE void prefetch(const void* p) { __builtin_prefetch(p); }

#undef TM_UNARY
#undef TM_BINARY

// ---- portable ------------------------------------------------------------------------------------------------------
#else

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
// Exact below 2^22 in magnitude; every caller rounds values far smaller than that.
TM_OUTLINE F32x16 round_even(F32x16 a) { TM_EACH(F32x16, __builtin_copysignf((a.v[i] + 12582912.0f) - 12582912.0f, a.v[i])); }
TM_OUTLINE I32x16 to_i32(F32x16 a) { TM_EACH(I32x16, static_cast<int32_t>(a.v[i])); }
TM_OUTLINE F32x16 to_f32(I32x16 a) { TM_EACH(F32x16, static_cast<float>(a.v[i])); }
TM_OUTLINE F32x16 bits_as_f32(I32x16 a) { TM_EACH(F32x16, bits_to_f32(static_cast<uint32_t>(a.v[i]))); }
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
TM_OUTLINE void store_as_i8(int8_t* p, I32x16 x) { for (int i = 0; i < 16; ++i) p[i] = static_cast<int8_t>(x.v[i]); }
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

TM_OUTLINE void prefetch(const void* p) { __builtin_prefetch(p); }

#undef TM_EACH
#undef TM_OUTLINE
#endif

// ---- shared by all paths -------------------------------------------------------------------------------------------

// The one tree that reduces 16 lanes: halves, then quarters, eighths, sixteenths.
TM_INLINE float reduce_add(F32x16 x) {
  float v[16];
  store(v, x);
  for (int half = 8; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) v[i] = v[i] + v[i + half];
  }
  return v[0];
}
TM_INLINE float reduce_max(F32x16 x) {
  float v[16];
  store(v, x);
  for (int half = 8; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) v[i] = v[i] > v[i + half] ? v[i] : v[i + half];
  }
  return v[0];
}

// 2^x: round to n, degree-6 Horner on x - n in [-0.5, 0.5] (relative error below 2e-7), scaled by 2^n in the exponent.
// Below -126 the result is 0; x must not exceed 127 (above, the result is infinity); NaN gives NaN.
TM_INLINE F32x16 exp2(F32x16 x) {
  const F32x16 clamped = min(set1(128.0f), max(set1(-127.0f), x));  // operand order: NaN passes through
  const F32x16 n = round_even(clamped);
  const F32x16 f = sub(clamped, n);
  F32x16 p = set1(1.5403530393381608e-4f);
  p = fma(p, f, set1(1.3333558146428443e-3f));
  p = fma(p, f, set1(9.6181291076284772e-3f));
  p = fma(p, f, set1(5.5504108664821580e-2f));
  p = fma(p, f, set1(2.4022650695910072e-1f));
  p = fma(p, f, set1(6.9314718055994531e-1f));
  p = fma(p, f, set1(1.0f));
  // NaN lanes: the integer conversion is undefined in C for the portable path, so it sees 0 and `p` stays NaN.
  const F32x16 whole = select_less(n, set1(256.0f), n, zero_f32());
  const F32x16 scale = bits_as_f32(shift_left<23>(add(to_i32(whole), set1_i32(127))));
  return select_less(x, set1(-126.0f), zero_f32(), mul(p, scale));
}

}  // namespace tokenmill::TM_ISA
