// exp, tanh and the normal distribution over sixteen lanes, all built on the one exp2 of simd.h (NUMERICS N5), the same bits on every path.
#pragma once

#include "kernels/simd.h"

namespace tokenmill::TM_ISA {

// e^x with a relative error below 1e-6, 0 below 2^-126, NaN for NaN; x above 88.25 counts as 88.25, e^x = 2.1e38.
// x log2(e) is carried in two floats: rounding it once would cost 5e-6 at x = -80.
TM_INLINE F32x16 exp(F32x16 x) {
  const F32x16 bounded = min(set1(88.25f), x);  // operand order: NaN passes through
  const F32x16 n = round_even(mul(bounded, set1(1.44269502162933349609375f)));
  const F32x16 f = fma(bounded, set1(1.44269502162933349609375f), sub(zero_f32(), n));
  return exp2_parts(n, fma(bounded, set1(1.92596299112661746887e-8f), f), x, -87.336544f);
}

// Upper tail of the normal distribution, erfc(x / sqrt(2)) / 2, for x >= 0; relative error below 1e-6 down to 2^-126.
// erfc(z) = t e^(-z^2) P(t) with t = 1 / (1 + z/2); P is a minimax fit of relative error 2e-8 for z in [0, 10], where
// erfc leaves fp32's range. e^(-x^2 / 2) takes x^2 in two floats.
TM_INLINE F32x16 normal_tail(F32x16 x) {
  const F32x16 bounded = min(set1(20.0f), x);  // operand order: NaN passes through
  const F32x16 t = div(set1(1.0f), fma(set1(0.35355339059327379f), bounded, set1(1.0f)));
  F32x16 p = set1(0.012283435604362415f);
  p = fma(p, t, set1(-0.12325246402531276f));
  p = fma(p, t, set1(0.4289235795722222f));
  p = fma(p, t, set1(-0.6700165976561983f));
  p = fma(p, t, set1(0.4212698609473964f));
  p = fma(p, t, set1(-0.09831552366612208f));
  p = fma(p, t, set1(0.22554121190684306f));
  p = fma(p, t, set1(0.2386449544090627f));
  p = fma(p, t, set1(0.28285702365277166f));
  p = fma(p, t, set1(0.2820644995906513f));
  const F32x16 square = mul(bounded, bounded);
  const F32x16 rest = fma(bounded, bounded, sub(zero_f32(), square));
  const F32x16 power = exp(mul(square, set1(-0.5f)));
  return mul(mul(mul(t, p), set1(0.5f)), fma(power, mul(rest, set1(-0.5f)), power));
}

// Odd polynomial below 0.6 (relative error 3e-9), (1 - e^-2|u|) / (1 + e^-2|u|) above.
TM_INLINE F32x16 tanh(F32x16 u) {
  const F32x16 size = abs(u);
  const F32x16 square = mul(u, u);
  F32x16 p = set1(-0.005895159013356861f);
  p = fma(p, square, set1(0.020795972520404545f));
  p = fma(p, square, set1(-0.05378383055115311f));
  p = fma(p, square, set1(0.1333192413018508f));
  p = fma(p, square, set1(-0.333332980022557f));
  const F32x16 small = fma(mul(p, square), u, u);
  const F32x16 e = exp(mul(size, set1(-2.0f)));
  const F32x16 large = div(sub(set1(1.0f), e), add(set1(1.0f), e));
  const F32x16 signed_large = select_less(u, zero_f32(), sub(zero_f32(), large), large);
  return select_less(size, set1(0.6f), small, signed_large);
}

}  // namespace tokenmill::TM_ISA
