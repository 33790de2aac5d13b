// Sixteen lanes, multiply and add without fma (NUMERICS N11), so that a row's weights have the same bits on every path.
#include "kernels/sampler_rows.h"

#include "kernels/simd.h"

namespace tokenmill::TM_ISA {
namespace {

constexpr float kInfinity = __builtin_inff();

// Runs step(i, lanes) over blocks of `block` elements, and done(block_index) after each.
template <class Step, class Done>
TM_INLINE void for_blocks(int64_t n, int64_t block, const Step& step, const Done& done) {
  for (int64_t start = 0; start < n; start += block) {
    const int64_t end = start + block < n ? start + block : n;
    int64_t i = start;
    for (; i + kLanes <= end; i += kLanes) step(i, kLanes);
    if (i < end) step(i, static_cast<int>(end - i));
    done(start / block);
  }
}

TM_INLINE F32x16 load_row(const float* p, int lanes, float fill) {
  return lanes == kLanes ? load(p) : keep_first(load_first(p, lanes), lanes, set1(fill));
}
TM_INLINE void store_row(float* p, F32x16 x, int lanes) {
  if (lanes == kLanes) {
    store(p, x);
  } else {
    store_first(p, x, lanes);
  }
}

// 2^x for x <= 0: the polynomial of simd.h's exp2, each step a multiplication and an addition.
TM_INLINE F32x16 exp2_unfused(F32x16 x) {
  const F32x16 clamped = max(x, set1(-127.0f));
  const F32x16 n = round_even(clamped);
  const F32x16 f = sub(clamped, n);
  F32x16 p = set1(1.5403530393381608e-4f);
  p = add(mul(p, f), set1(1.3333558146428443e-3f));
  p = add(mul(p, f), set1(9.6181291076284772e-3f));
  p = add(mul(p, f), set1(5.5504108664821580e-2f));
  p = add(mul(p, f), set1(2.4022650695910072e-1f));
  p = add(mul(p, f), set1(6.9314718055994531e-1f));
  p = add(mul(p, f), set1(1.0f));
  const F32x16 scale = bits_as_f32(shift_left<23>(add(to_i32(n), set1_i32(127))));
  return select_less(x, set1(-126.0f), zero_f32(), mul(p, scale));
}

bool block_maxima(const float* x, int64_t n, float* maxima) {
  F32x16 unusable = zero_f32();  // 1 in lanes that met NaN or +infinity
  F32x16 largest = set1(-kInfinity);
  for_blocks(
      n, kMaximaBlock,
      [&](int64_t i, int lanes) __attribute__((always_inline)) {
        const F32x16 v = load_row(x + i, lanes, -kInfinity);
        largest = max(v, largest);
        unusable = max(unusable, select_less(v, set1(kInfinity), zero_f32(), set1(1.0f)));
      },
      [&](int64_t block) __attribute__((always_inline)) {
        maxima[block] = reduce_max(largest);
        largest = set1(-kInfinity);
      });
  return reduce_max(unusable) == 0.0f;
}

void weights(const float* x, int64_t n, float shift, float scale, float least, float* out, float* sums) {
  const F32x16 shifts = set1(shift), scales = set1(scale), least_weights = set1(least);
  F32x16 sum = zero_f32();
  for_blocks(
      n, kSumBlock,
      [&](int64_t i, int lanes) __attribute__((always_inline)) {
        F32x16 w = exp2_unfused(mul(sub(load_row(x + i, lanes, -kInfinity), shifts), scales));
        w = select_less(w, least_weights, zero_f32(), w);
        if (out != nullptr) store_row(out + i, w, lanes);
        sum = add(sum, w);
      },
      [&](int64_t block) __attribute__((always_inline)) {
        sums[block] = reduce_add(sum);
        sum = zero_f32();
      });
}

template <bool kCounts>
TM_INLINE void sum_above(const float* keys, const float* weights, int64_t n, const float* thresholds, double* reached) {
  F32x16 threshold[kThresholds], sum[kThresholds];
#pragma GCC unroll 8
  for (int t = 0; t < kThresholds; ++t) {
    threshold[t] = set1(thresholds[t]);
    sum[t] = zero_f32();
    reached[t] = 0.0;
  }
  for_blocks(
      n, kSumBlock,
      [&](int64_t i, int lanes) __attribute__((always_inline)) {
        const F32x16 key = load_row(keys + i, lanes, -kInfinity);
        const F32x16 weight = kCounts ? keep_first(set1(1.0f), lanes, zero_f32()) : load_row(weights + i, lanes, 0.0f);
#pragma GCC unroll 8
        for (int t = 0; t < kThresholds; ++t) sum[t] = add(sum[t], select_less(key, threshold[t], zero_f32(), weight));
      },
      [&](int64_t) __attribute__((always_inline)) {
#pragma GCC unroll 8
        for (int t = 0; t < kThresholds; ++t) {
          reached[t] += reduce_add(sum[t]);
          sum[t] = zero_f32();
        }
      });
}

void above(const float* keys, const float* weights, int64_t n, const float* thresholds, double* reached) {
  if (weights == nullptr) {
    sum_above<true>(keys, weights, n, thresholds, reached);
  } else {
    sum_above<false>(keys, weights, n, thresholds, reached);
  }
}

int64_t gather(const float* keys, const float* weights, const int32_t* ids, int64_t n, float low, float high, int64_t most,
               float* out_keys, float* out_weights, int32_t* out_ids) {
  const F32x16 lows = set1(low), highs = set1(high);
  int64_t count = 0;
  for (int64_t i = 0; i < n; i += kLanes) {
    const F32x16 key = load_row(keys + i, n - i < kLanes ? static_cast<int>(n - i) : kLanes, kInfinity);
    for (uint32_t inside = less_bits(key, highs) & ~less_bits(key, lows); inside != 0; inside &= inside - 1) {
      const int64_t from = i + __builtin_ctz(inside);
      out_keys[count] = keys[from];
      if (weights != nullptr) out_weights[count] = weights[from];
      out_ids[count] = ids != nullptr ? ids[from] : static_cast<int32_t>(from);
      ++count;
    }
    if (count > most) return -1;
  }
  return count;
}

void drop_after(const float* keys, int64_t n, float key, int64_t last, float* weights, float* sums) {
  const F32x16 limit = set1(key);
  F32x16 sum = zero_f32();
  for_blocks(
      n, kSumBlock,
      [&](int64_t i, int lanes) __attribute__((always_inline)) {
        const F32x16 row_key = load_row(keys + i, lanes, -kInfinity), weight = load_row(weights + i, lanes, 0.0f);
        // Lanes up to `last` keep equal keys, the others larger keys only.
        const int64_t equal = last + 1 - i;
        const F32x16 not_less = select_less(row_key, limit, zero_f32(), weight);
        F32x16 kept = not_less;
        if (equal < kLanes) {
          const F32x16 larger = select_less(limit, row_key, weight, zero_f32());
          kept = keep_first(not_less, equal < 0 ? 0 : static_cast<int>(equal), larger);
        }
        store_row(weights + i, kept, lanes);
        sum = add(sum, kept);
      },
      [&](int64_t block) __attribute__((always_inline)) {
        sums[block] = reduce_add(sum);
        sum = zero_f32();
      });
}

double mean_distance(const float* x, const float* weights, int64_t n, float shift) {
  const F32x16 shifts = set1(shift);
  double total = 0.0;
  F32x16 sum = zero_f32();
  for_blocks(
      n, kSumBlock,
      [&](int64_t i, int lanes) __attribute__((always_inline)) {
        const F32x16 weight = load_row(weights + i, lanes, 0.0f);
        const F32x16 distance = sub(shifts, load_row(x + i, lanes, 0.0f));
        sum = add(sum, select_less(zero_f32(), weight, mul(weight, distance), zero_f32()));
      },
      [&](int64_t) __attribute__((always_inline)) {
        total += reduce_add(sum);
        sum = zero_f32();
      });
  return total;
}

void centered_keys(const float* x, const float* weights, int64_t n, float shift, float scale, float offset, float* keys) {
  const F32x16 shifts = set1(shift), scales = set1(scale), offsets = set1(offset);
  for_blocks(
      n, kSumBlock,
      [&](int64_t i, int lanes) __attribute__((always_inline)) {
        const F32x16 weight = load_row(weights + i, lanes, 0.0f);
        const F32x16 distance = abs(add(mul(sub(shifts, load_row(x + i, lanes, 0.0f)), scales), offsets));
        store_row(keys + i, select_less(zero_f32(), weight, sub(zero_f32(), distance), set1(-kInfinity)), lanes);
      },
      [](int64_t) __attribute__((always_inline)) {});
}

}  // namespace

extern const SamplerRows sampler_rows_table = {block_maxima, weights, above, gather, drop_after, mean_distance, centered_keys};

}  // namespace tokenmill::TM_ISA
