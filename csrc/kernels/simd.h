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

TM_INLINE int32_t load_i32(const uint8_t* p) {
  int32_t value;
  memcpy(&value, p, 4);
  return value;
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

}  // namespace tokenmill::TM_ISA

#if defined(TM_PATH_AVX512)
#include "kernels/simd/avx512.h"
#elif defined(TM_PATH_AVX2)
#include "kernels/simd/avx2.h"
#elif defined(TM_PATH_NEON)
#include "kernels/simd/neon.h"
#else
#include "kernels/simd/portable.h"
#endif

namespace tokenmill::TM_ISA {

// ---- dot products --------------------------------------------------------------------------------------------------

// dot4<kCodeBits>(acc, w, quad): acc[lane] += sum over i of w[4 lane + i] * a[i], exact; `quad` holds the four int8
// activations a, in -127..127, and kCodeBits says how many bits the unsigned codes w use.
// dot2(acc, w, pair): acc[lane] += w[2 lane] * a[0] + w[2 lane + 1] * a[1] on int16, exact where the sums fit int32.

// A running sum of up to kMost quads' dot products, exact.
template <int kCodeBits>
struct QuadSum {
  static constexpr int kMost = 8;
  static constexpr bool kOfPairs = false;
  I32x16 sum;

  TM_INLINE void begin(I32x16 start) { sum = start; }
  TM_INLINE void add(int32_t quad, U8x64 w) { sum = dot4<kCodeBits>(sum, w, quad); }
  TM_INLINE void add_from(const uint8_t* quad, U8x64 w) {
#if defined(TM_HAS_DOT4_FROM)
    sum = dot4_from(sum, w, quad);
#else
    add(load_i32(quad), w);
#endif
  }
  TM_INLINE I32x16 total() const { return sum; }
};

#if defined(TM_SUMS_PAIRS)
// Without a four-element dot product, products are added as int16 for as long as they cannot overflow: two instructions a
// quad instead of three. (2^6 - 1) * 127 * 2 * 2 is the closest, 32,004.
template <int kQuads>
struct PairSum {
  static constexpr int kMost = kQuads;
  static constexpr bool kOfPairs = true;
  I32x16 start;
  I16x32 pairs;
  bool empty;  // known when the loop over quads is unrolled

  TM_INLINE void begin(I32x16 first) { start = first, empty = true; }
  TM_INLINE void add(int32_t quad, U8x64 w) {
    pairs = empty ? dot_pairs(w, quad) : TM_ISA::add(pairs, dot_pairs(w, quad));
    empty = false;
  }
  TM_INLINE void add_from(const uint8_t* quad, U8x64 w) { add(load_i32(quad), w); }
  TM_INLINE I32x16 total() const { return add_sums_of_pairs(start, pairs); }
  // start + the sum times `multiplier`, twice in each lane: scaling costs nothing here.
  TM_INLINE I32x16 total_times(I32x16 multiplier) const { return multiply_add_pairs(start, pairs, multiplier); }
};
template <> struct QuadSum<4> : PairSum<8> {};
template <> struct QuadSum<5> : PairSum<4> {};
template <> struct QuadSum<6> : PairSum<2> {};
// Codes of so many bits take the same way as those of dot_bits(code_bits): their formats share a kernel.
constexpr int dot_bits(int code_bits) { return code_bits <= 4 ? 4 : code_bits; }
#else
constexpr int dot_bits(int code_bits) { return code_bits <= 6 ? 6 : code_bits; }
#endif

#if !defined(TM_HAS_DOT2_FROM)
TM_INLINE I32x16 dot2_from(I32x16 acc, I32x16 w, const uint8_t* pair) { return dot2(acc, w, load_i32(pair)); }
#endif

// acc + a * b as int32; b comes from as_multiplier(x), x in -32768..32767. With kI16, a lies there, too.
#if defined(TM_HAS_MULTIPLY_ADD_I16)
inline constexpr bool kHasMultiplyAddI16 = true;
#else
inline constexpr bool kHasMultiplyAddI16 = false;
TM_INLINE I32x16 multiply_add_i16(I32x16 acc, I32x16 a, I32x16 b) { return multiply_add_i32(acc, a, b); }
#endif
template <bool kI16>
TM_INLINE I32x16 multiply_add(I32x16 acc, I32x16 a, I32x16 b) {
  if constexpr (kI16) return multiply_add_i16(acc, a, b);
  return multiply_add_i32(acc, a, b);
}

// ---- shared by all paths -------------------------------------------------------------------------------------------

// The one tree that reduces 16 lanes: halves, then quarters, eighths, sixteenths. Upper lanes hold nothing of meaning.
TM_INLINE float reduce_add(F32x16 x) {
  x = add(x, lanes_down<8>(x));
  x = add(x, lanes_down<4>(x));
  x = add(x, lanes_down<2>(x));
  return first_lane(add(x, lanes_down<1>(x)));
}
TM_INLINE float reduce_max(F32x16 x) {
  x = max(x, lanes_down<8>(x));
  x = max(x, lanes_down<4>(x));
  x = max(x, lanes_down<2>(x));
  return first_lane(max(x, lanes_down<1>(x)));
}

// 2^(n + f) for whole n and f in [-0.5, 0.5]: degree-6 Horner (relative error below 2e-7), scaled in the exponent. 0 where
// x, which is n + f to within rounding, is below `least` >= -126. NaN in f or n and not in x gives 0, NaN in x gives NaN.
TM_INLINE F32x16 exp2_parts(F32x16 n, F32x16 f, F32x16 x, float least) {
  F32x16 p = set1(1.5403530393381608e-4f);
  p = fma(p, f, set1(1.3333558146428443e-3f));
  p = fma(p, f, set1(9.6181291076284772e-3f));
  p = fma(p, f, set1(5.5504108664821580e-2f));
  p = fma(p, f, set1(2.4022650695910072e-1f));
  p = fma(p, f, set1(6.9314718055994531e-1f));
  p = fma(p, f, set1(1.0f));
  return select_less(x, set1(least), zero_f32(), scale_by_power(p, n));
}

// 2^x for x below 127.5, 0 below -126, NaN for NaN.
TM_INLINE F32x16 exp2(F32x16 x) {
  const F32x16 n = round_even(x);
  return exp2_parts(n, sub(x, n), x, -126.0f);
}

}  // namespace tokenmill::TM_ISA
