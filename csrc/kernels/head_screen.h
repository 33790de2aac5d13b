// A cheap stand-in for an output head in Q8_0: the same matrix in Q5_0, and how far its scores can be off.
//
// Decoding one token reads the whole head to find one row. Where only the largest logit counts, 5 of 8 bits are read
// first. Every score of the screen lies within bound[n] * norm of the head's own, so what cannot reach the best needs no
// more bits:
//
//   |score - logit| <= sum_g e[n, g] h[g] <= |e[n]| |h|      h[g] = sum of |x| in group g, e[n, g] = largest |w - screen w|
//
// (Cauchy-Schwarz over groups of 32 columns; per group the worst case, so nothing is assumed about x or w.) Both sums are
// of the same int8 activations and exact integer dot products; their fp32 roundings are part of bound[n].
#pragma once

#include <cstdint>

#include "kernels/linear.h"

namespace tokenmill {

inline constexpr WeightFormat kScreenFormat = WeightFormat::kQ5_0;

// Whether a head of this format can be screened.
TM_LAYOUT_INLINE bool can_screen(WeightFormat format) { return format == WeightFormat::kQ8_0; }

// Fills row blocks [block_begin, block_end) of `screen` (packed kScreenFormat, [n, k]) and bounds[n] of their rows.
void make_screen(const PackedWeight& head, uint8_t* screen, float* bounds, int32_t block_begin, int32_t block_end);

// |h| of an activation row of k values (kInt8Group32), rounded up; NaN if a scale is.
double screen_norm(const uint8_t* x, int32_t k);

// Beside bound * norm: what results that are too small for fp32 may lose on the way.
inline constexpr double kScreenUnderflow = 1e-25;
// Norms beyond this could overflow a sum: such rows are not screened.
inline constexpr double kMostScreenNorm = 1e25;

}  // namespace tokenmill
