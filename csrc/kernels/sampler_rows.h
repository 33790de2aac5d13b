// The passes of the sampler over all logits of a row; what is left to the sampler itself looks at few of them.
#pragma once

#include <cstdint>

namespace tokenmill {

inline constexpr int64_t kMaximaBlock = 64;  // elements under one maximum; a row of 152k has 2,375 maxima
inline constexpr int64_t kSumBlock = 4096;   // weights under one fp32 sum; sums of blocks are added in double
inline constexpr int kThresholds = 8;        // thresholds tried by one pass of `above`

// Mass and number of the elements at or above each threshold.
struct Above {
  double mass[kThresholds];
  int64_t count[kThresholds];
};

struct SamplerRows {
  // maxima[b] = largest of x[64 b .. 64 b + 63]. False if an element is NaN or +infinity (maxima are then unspecified).
  bool (*block_maxima)(const float* x, int64_t n, float* maxima);
  // weights[i] = 2^((x[i] - shift) * scale), zero below 2^-126; sums[b] = sum of weights[4096 b .. 4096 b + 4095].
  // x[i] <= shift and scale > 0. `weights` may be null (only the sums are wanted).
  void (*weights)(const float* x, int64_t n, float shift, float scale, float* weights, float* sums);
  void (*above)(const float* keys, const float* weights, int64_t n, const float* thresholds, Above* out);
  // weights[i] = 0 where keys[i] < threshold, and the sums anew. `keys` may be `weights`.
  void (*drop_below)(const float* keys, int64_t n, float threshold, float* weights, float* sums);
  // Sum of weights[i] * (shift - x[i]) over positive weights.
  double (*mean_distance)(const float* x, const float* weights, int64_t n, float shift);
  // keys[i] = -|(shift - x[i]) * scale + offset|, -infinity where the weight is zero.
  void (*centered_keys)(const float* x, const float* weights, int64_t n, float shift, float scale, float offset, float* keys);
};

// The kernels of the instruction-set path in use.
const SamplerRows& sampler_rows();

}  // namespace tokenmill
