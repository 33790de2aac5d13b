// The inner loops of attention, on tiles of query rows that stay in registers: scores, P = exp2(score - maximum), P·V.
//
// A tile decides which loads are shared, never the order of an output's additions.
#pragma once

#include "kernels/attention.h"
#include "kernels/elementary.h"
#include "kernels/simd.h"

namespace tokenmill::TM_ISA {

// Rows of a tile that reads the cache's elements, converting them as it goes, and of one that reads floats; vectors of
// 16 keys, and of 16 dimensions of a value, that a tile of so many rows reads at once.
#if defined(TM_PATH_AVX512)
inline constexpr int kDirectRows = 8, kFloatRows = 12;
inline constexpr int kKeyVectors = 2;
inline constexpr int kColumnVectors = 2;
inline constexpr int value_vectors(int rows) { return rows <= 4 ? 4 : 2; }
#elif defined(TM_PATH_AVX2)
inline constexpr int kDirectRows = 4, kFloatRows = 6;
inline constexpr int kKeyVectors = 1;
inline constexpr int kColumnVectors = 1;
inline constexpr int value_vectors(int rows) { return rows <= 2 ? 2 : 1; }
#elif defined(TM_PATH_NEON)
inline constexpr int kDirectRows = 4, kFloatRows = 4;
inline constexpr int kKeyVectors = 1;
inline constexpr int kColumnVectors = 1;
inline constexpr int value_vectors(int rows) { return rows <= 2 ? 2 : 1; }
#else
inline constexpr int kDirectRows = 2, kFloatRows = 2;
inline constexpr int kKeyVectors = 1;
inline constexpr int kColumnVectors = 1;
inline constexpr int value_vectors(int) { return 1; }
#endif

// How elements become floats.
struct F16Elements {
  using Element = uint16_t;
  static TM_INLINE F32x16 load16(const Element* p) { return load_f16(p); }
};
struct Bf16Elements {
  using Element = uint16_t;
  static TM_INLINE F32x16 load16(const Element* p) { return load_bf16(p); }
};
struct F32Elements {
  using Element = float;
  static TM_INLINE F32x16 load16(const Element* p) { return load(p); }
};

// Rows of the next tile: all that are left, or full tiles, or two halves rather than a full tile and a small rest.
TM_INLINE int next_tile(int32_t left, int full) {
  if (left <= full) return left;
  return left < 2 * full ? (left + 1) / 2 : full;
}

// ---- scores --------------------------------------------------------------------------------------------------------

// scores[row][token] = sum over d, ascending in one fma chain from zero, of q[d][row] * key[d][token], for one page. kStride floats
// lie between dimensions of q. Brings the lines at `ahead` and `next` (null or head_dim each) into the cache on the way.
template <class Source, int kStride, int kRows>
void score_tile(const float* q, const typename Source::Element* keys, int32_t head_dim, float* scores, const uint8_t* ahead,
                const uint8_t* next) {
  for (int32_t token = 0; token < kPageTokens; token += kLanes * kKeyVectors) {
    F32x16 sums[kRows][kKeyVectors];
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < kKeyVectors; ++v) sums[r][v] = zero_f32();
    }
    const typename Source::Element* column = keys + token * head_dim;
    for (int32_t d = 0; d < head_dim; ++d, column += kLanes) {
      if (ahead != nullptr) prefetch(ahead + 64 * d);
      if (next != nullptr) prefetch(next + 64 * d);
      F32x16 key[kKeyVectors];
#pragma GCC unroll 2
      for (int v = 0; v < kKeyVectors; ++v) key[v] = Source::load16(column + v * head_dim * kLanes);
#pragma GCC unroll 12
      for (int r = 0; r < kRows; ++r) {
        const F32x16 query = set1(q[d * kStride + r]);
#pragma GCC unroll 2
        for (int v = 0; v < kKeyVectors; ++v) sums[r][v] = fma(query, key[v], sums[r][v]);
      }
    }
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
      for (int v = 0; v < kKeyVectors; ++v) store(scores + r * kScoreStride + token + v * kLanes, sums[r][v]);
    }
  }
}

template <class Source, int kStride, int kRows>
TM_INLINE void score_rows(int rows, const float* q, const typename Source::Element* keys, int32_t head_dim, float* scores,
                          const uint8_t* ahead, const uint8_t* next) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return score_rows<Source, kStride, kRows - 1>(rows, q, keys, head_dim, scores, ahead, next);
  }
  score_tile<Source, kStride, kRows>(q, keys, head_dim, scores, ahead, next);
}

// ---- P -------------------------------------------------------------------------------------------------------------

// The largest of the scores of slots [begin, end), lane by lane. Applies the soft cap; lanes outside become -inf, vectors
// outside are not touched.
TM_INLINE F32x16 mask_scores(float* scores, int32_t begin, int32_t end, float softcap) {
  constexpr float kLog2e = 1.44269504088896340736f;
  const F32x16 nothing = set1(-__builtin_inff());
  F32x16 highest = nothing;
  for (int32_t i = begin / kLanes * kLanes; i < end; i += kLanes) {
    F32x16 s = load(scores + i);
    if (softcap > 0.0f || i < begin || end - i < kLanes) {
      if (softcap > 0.0f) s = mul(mul(set1(softcap), tanh(div(s, set1(softcap)))), set1(kLog2e));
      if (i < begin) s = keep_first(nothing, begin - i, s);
      if (end - i < kLanes) s = keep_first(s, end - i, nothing);
      store(scores + i, s);
    }
    highest = max(highest, s);
  }
  return highest;
}

// Turns the masked scores of slots [begin, end) into P = exp2(score - maximum), masked lanes exactly 0; returns the sum
// of P lane by lane. For every vector brings a line of the scores of `later` into the cache, which are masked soon, and
// one at `ahead`, unless that is null.
TM_INLINE F32x16 exponentiate(float* scores, int32_t begin, int32_t end, float maximum, const float* later,
                                const uint8_t* ahead) {
  F32x16 total = zero_f32();
  for (int32_t i = begin / kLanes * kLanes; i < end; i += kLanes) {
    prefetch(later + i);
    if (ahead != nullptr) prefetch(ahead + 64 / kLanes * i);
    const F32x16 p = exp2(sub(load(scores + i), set1(maximum)));
    store(scores + i, p);
    total = add(total, p);
  }
  return total;
}

// ---- values --------------------------------------------------------------------------------------------------------

// sums[row][d] += p[row][token] * value[token][d], tokens ascending, for kVectors vectors of dimensions. Brings as many
// bytes at `ahead` into the cache as it reads, unless that is null.
template <class Source, int kRows, int kVectors>
void value_tile(const float* p, const typename Source::Element* values, int32_t value_stride, int32_t tokens, float* sums,
                int32_t record, const uint8_t* ahead) {
  constexpr int kBytes = kVectors * kLanes * static_cast<int>(sizeof(typename Source::Element));
  F32x16 sum[kRows][kVectors];
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sum[r][v] = load(sums + r * record + v * kLanes);
  }
  for (int32_t t = 0; t < tokens; ++t, values += value_stride) {
    if (ahead != nullptr) {
#pragma GCC unroll 4
      for (int byte = 0; byte < kBytes; byte += 64) prefetch(ahead + t * kBytes + byte);
    }
    F32x16 value[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) value[v] = Source::load16(values + v * kLanes);
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
      const F32x16 weight = set1(p[r * kScoreStride + t]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[r][v] = fma(weight, value[v], sum[r][v]);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) store(sums + r * record + v * kLanes, sum[r][v]);
  }
}

// All dimensions of a page of cache elements: values[token][dimension], `vectors` of them.
template <class Source, int kRows>
TM_INLINE void value_rows(int rows, const float* p, const typename Source::Element* values, int32_t value_stride,
                          int32_t tokens, int32_t vectors, float* sums, int32_t record, const uint8_t* ahead) {
  if constexpr (kRows > 1) {
    if (rows < kRows) {
      return value_rows<Source, kRows - 1>(rows, p, values, value_stride, tokens, vectors, sums, record, ahead);
    }
  }
  constexpr int kVectors = value_vectors(kRows);
  const auto bytes = tokens * kLanes * static_cast<int32_t>(sizeof(typename Source::Element));
  int32_t v = 0;
  for (; v + kVectors <= vectors; v += kVectors) {
    value_tile<Source, kRows, kVectors>(p, values + v * kLanes, value_stride, tokens, sums + v * kLanes, record, ahead);
    if (ahead != nullptr) ahead += kVectors * bytes;
  }
  for (; v < vectors; ++v) {
    value_tile<Source, kRows, 1>(p, values + v * kLanes, value_stride, tokens, sums + v * kLanes, record, ahead);
    if (ahead != nullptr) ahead += bytes;
  }
}

// A page's keys as floats.
template <class Source>
TM_INLINE void convert_keys(const typename Source::Element* keys, int32_t head_dim, float* out) {
  for (int32_t i = 0; i < kPageTokens * head_dim; i += kLanes) store(out + i, Source::load16(keys + i));
}

// kVectors vectors of dimensions of a page's values as floats: column[token][dimension].
template <class Source, int kVectors>
TM_INLINE void convert_column(const typename Source::Element* values, int32_t stride, float* column) {
  for (int32_t t = 0; t < kPageTokens; ++t, values += stride, column += kVectors * kLanes) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) store(column + v * kLanes, Source::load16(values + v * kLanes));
  }
}

// P·V of such a column.
template <int kRows, int kVectors>
TM_INLINE void column_rows(int rows, const float* p, const float* column, int32_t tokens, float* sums, int32_t record) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return column_rows<kRows - 1, kVectors>(rows, p, column, tokens, sums, record);
  }
  value_tile<F32Elements, kRows, kVectors>(p, column, kVectors * kLanes, tokens, sums, record, nullptr);
}

}  // namespace tokenmill::TM_ISA
