// Kernels that work on one row at a time: norms, rotary embedding, activations, elementwise arithmetic.
//
// Every output element depends on its own row only, and sums run in 64 virtual lanes (index mod 64) and one fixed tree
// (NUMERICS N5), so results do not depend on rows, threads or instruction set. Input and output may be the same row.
#pragma once

#include <cstdint>

namespace tokenmill {

enum class Activation : int32_t { kSilu = 0, kGelu = 1, kGeluTanh = 2 };
enum class RopeStyle : int32_t { kHalf = 0, kInterleaved = 1 };

struct RopeArguments {
  int32_t heads;
  int32_t head_dim;
  int32_t rotary_dim;  // even, at most head_dim; the elements after it are copied
  RopeStyle style;
};

struct PointwiseKernels {
  // y = x / sqrt(mean(x^2) + eps) * (weight + weight_offset) over groups of `group_width` of the row's `width` elements;
  // weight [group_width].
  void (*rms_norm)(const float* x, const float* weight, float weight_offset, float eps, int32_t width,
                   int32_t group_width, float* y);
  // Rotates every head; `angles` holds rotary_dim / 2 cosines, then rotary_dim / 2 sines, of the row's position.
  void (*rope)(const RopeArguments& arguments, const float* x, const float* angles, float* y);
  // y = activation(gate) * up.
  void (*gated_activation)(Activation activation, const float* gate, const float* up, int32_t width, float* y);
  void (*add)(const float* a, const float* b, int32_t width, float* y);
  void (*scale)(const float* x, float factor, int32_t width, float* y);
  // y = cap * tanh(x / cap).
  void (*softcap)(const float* x, float cap, int32_t width, float* y);
};

const PointwiseKernels& pointwise_kernels();  // of the path in use

}  // namespace tokenmill
