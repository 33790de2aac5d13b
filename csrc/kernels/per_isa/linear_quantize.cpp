// fp32 -> int8 activations (NUMERICS N2): scale = amax / 127, code = round to nearest even of x * (127 / amax).
//
// A group that holds NaN or an infinity gets the scale NaN and codes of zero, so that every output that reads it becomes
// NaN. A group whose amax is so small (below 2^-121) that 127 / amax is infinite counts as zeros.
#include "kernels/per_isa/linear_families.h"
#include "kernels/simd.h"

namespace tokenmill::TM_ISA {
namespace {

// The first `count` (at most 16) values; zeros after them.
TM_INLINE F32x16 load_lanes(const float* x, int count) { return count >= kLanes ? load(x) : load_first(x, count); }

struct GroupScale {
  float scale;    // of one code
  float inverse;  // codes per unit; 0 where all codes are to be 0
};

TM_INLINE GroupScale group_scale(const float* x, int count) {
  const I32x16 magnitude = set1_i32(0x7fffffff);
  I32x16 largest = zero_i32();  // bits of magnitudes are ordered as the magnitudes are, NaN last
  for (int i = 0; i < count; i += kLanes) largest = max(largest, bit_and(bits_as_i32(load_lanes(x + i, count - i)), magnitude));
  const uint32_t bits = static_cast<uint32_t>(reduce_max(largest));
  if (bits >= 0x7f800000U) return {bits_to_f32(0x7fc00000U), 0.0f};
  const float amax = bits_to_f32(bits);
  const float inverse = 127.0f / amax;
  if (!(inverse <= 0x1.fffffep127f)) return {0.0f, 0.0f};
  return {amax / 127.0f, inverse};
}

// Codes of up to 16 values. With inverse = 0 the products of infinities would be NaN, so nothing is multiplied.
TM_INLINE I32x16 codes_of(const float* x, int count, float inverse) {
  if (inverse == 0.0f) return zero_i32();
  return to_i32(round_even(mul(load_lanes(x, count), set1(inverse))));
}

// The last vector of a row may reach past k: codes there are zero, and they fill padding only.
TM_INLINE void store_codes(uint8_t* out, I32x16 codes) { store_as_i8(reinterpret_cast<int8_t*>(out), codes); }

void quantize_groups_of_32(const float* x, int32_t k, const ActivationLayout& layout, uint8_t* out) {
  float* scales = reinterpret_cast<float*>(out + layout.scales);
  int32_t* negative_sums = reinterpret_cast<int32_t*>(out + layout.negative_sums);
  float* scaled_sums = reinterpret_cast<float*>(out + layout.scaled_sums);
  for (int32_t column = 0, g = 0; column < k; column += 32, ++g) {
    const int count = k - column < 32 ? k - column : 32;
    const GroupScale group = group_scale(x + column, count);
    I32x16 sum = zero_i32();
    for (int i = 0; i < count; i += kLanes) {
      const I32x16 codes = codes_of(x + column + i, count - i, group.inverse);
      store_codes(out + column + i, codes);
      sum = add(sum, codes);
    }
    scales[g] = group.scale;
    const int32_t codes_sum = reduce_add(sum);
    negative_sums[g] = -codes_sum;
    scaled_sums[g] = static_cast<float>(codes_sum) * group.scale;
  }
}

void quantize_groups_of_256(const float* x, int32_t k, const ActivationLayout& layout, uint8_t* out) {
  float* scales = reinterpret_cast<float*>(out + layout.scales);
  int32_t* negative_sums = reinterpret_cast<int32_t*>(out + layout.negative_sums);
  int16_t* pairs16 = reinterpret_cast<int16_t*>(out + layout.pairs16);
  int16_t* pairs32 = reinterpret_cast<int16_t*>(out + layout.pairs32);
  for (int32_t column = 0, g = 0; column < k; column += 256, ++g) {
    const int count = k - column < 256 ? k - column : 256;
    const GroupScale group = group_scale(x + column, count);
    scales[g] = group.scale;
    for (int i = 0; i < count; i += kLanes) {
      const I32x16 codes = codes_of(x + column + i, count - i, group.inverse);
      store_codes(out + column + i, codes);
      const int index = (column + i) / 16;
      const int32_t sum = reduce_add(codes);
      negative_sums[index] = -sum;
      pairs16[index] = static_cast<int16_t>(sum);
      pairs32[index / 2] = static_cast<int16_t>(index % 2 == 0 ? pairs16[index] : pairs16[index - 1] + pairs16[index]);
    }
  }
}

}  // namespace

void quantize_row(const float* x, int32_t k, ActivationFormat format, uint8_t* out) {
  const ActivationLayout layout = activation_layout(format, k);
  if (format == ActivationFormat::kF32) {
    memcpy(out, x, static_cast<size_t>(k) * 4);
    return;
  }
  // Everything past the written values is zero, so that a row's bytes depend on x alone.
  memset(out, 0, layout.bytes);
  if (format == ActivationFormat::kInt8Group32) {
    quantize_groups_of_32(x, k, layout, out);
  } else {
    quantize_groups_of_256(x, k, layout, out);
  }
}

}  // namespace tokenmill::TM_ISA
