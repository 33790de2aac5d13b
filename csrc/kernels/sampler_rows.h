// The passes of the sampler over all logits of a row; what is left to the sampler itself looks at few of them.
#pragma once

#include <cstdint>

namespace tokenmill {

inline constexpr int64_t kMaximaBlock = 256;  // elements under one maximum; a row of 152k has 594 maxima
inline constexpr int64_t kSumBlock = 4096;   // weights under one fp32 sum; sums of blocks are added in double
inline constexpr int kThresholds = 8;        // thresholds tried by one pass of `above`

struct SamplerRows {
  // maxima[b] = largest of x[256 b .. 256 b + 255]. False if an element is NaN or +infinity (maxima are then unspecified).
  bool (*block_maxima)(const float* x, int64_t n, float* maxima);
  // weights[i] = 2^((x[i] - shift) * scale), zero below 2^-126 and below `least`; sums[b] = sum of
  // weights[4096 b .. 4096 b + 4095]. x[i] <= shift and scale > 0. `weights` may be null (only the sums are wanted).
  void (*weights)(const float* x, int64_t n, float shift, float scale, float least, float* weights, float* sums);
  // reached[t] = sum of the weights (their number, if `weights` is null) whose key is at least thresholds[t].
  void (*above)(const float* keys, const float* weights, int64_t n, const float* thresholds, double* reached);
  // Copies what has a key in [low, high), in order, and returns how many there are; -1 once there are more than `most`
  // (room for `most` + 16 is then needed). `weights` may be null; ids[i] is i if it is null. The results may overwrite the inputs.
  int64_t (*gather)(const float* keys, const float* weights, const int32_t* ids, int64_t n, float low, float high,
                    int64_t most, float* out_keys, float* out_weights, int32_t* out_ids);
  // weights[i] = 0 where keys[i] < key, or keys[i] == key and i > last; and the sums anew.
  void (*drop_after)(const float* keys, int64_t n, float key, int64_t last, float* weights, float* sums);
  // Sum of weights[i] * (shift - x[i]) over positive weights.
  double (*mean_distance)(const float* x, const float* weights, int64_t n, float shift);
  // keys[i] = -|(shift - x[i]) * scale + offset|, -infinity where the weight is zero.
  void (*centered_keys)(const float* x, const float* weights, int64_t n, float shift, float scale, float offset, float* keys);
};

// The kernels of the instruction-set path in use.
const SamplerRows& sampler_rows();

}  // namespace tokenmill
