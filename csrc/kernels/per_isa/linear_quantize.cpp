// fp32 -> int8 activations (NUMERICS N2): scale = amax / 127, code = round to nearest even of x * (127 / amax).
//
// A group that holds NaN or an infinity gets the scale NaN and codes of zero, so that every output that reads it becomes
// NaN. A group whose amax is so small (below 2^-121) that 127 / amax is infinite counts as zeros.
#include "kernels/per_isa/linear_families.h"
#include "kernels/simd.h"

namespace tokenmill::TM_ISA {
namespace {

constexpr int32_t kBlock = 64;  // values whose codes are stored together
constexpr int kGroups = 16;     // of a strip: one lane each

// A row in blocks of 64, the last one filled up with zeros.
struct Row {
  const float* x;
  int32_t whole, blocks;
  alignas(64) float last[kBlock];

  TM_INLINE Row(const float* values, int32_t k) : x(values), whole(k / kBlock), blocks((k + kBlock - 1) / kBlock) {
    if (whole == blocks) return;
    memset(last, 0, sizeof(last));
    memcpy(last, x + whole * kBlock, static_cast<size_t>(k % kBlock) * sizeof(float));
  }
  TM_INLINE const float* block(int32_t index) const { return index < whole ? x + index * kBlock : last; }
};

// Bits of the larger magnitudes of two vectors; bits of magnitudes are ordered as the magnitudes are, NaN last.
TM_INLINE I32x16 larger(const float* x) {
  const I32x16 magnitude = set1_i32(0x7fffffff);
  return max(bit_and(bits_as_i32(load(x)), magnitude), bit_and(bits_as_i32(load(x + kLanes)), magnitude));
}

struct Scales {
  alignas(64) float scale[kGroups];    // of one code
  alignas(64) float inverse[kGroups];  // codes per unit; 0 where all codes are to be 0

  TM_INLINE explicit Scales(const I32x16 (&largest)[kGroups]) {
    const F32x16 amax = bits_as_f32(reduce_max_each(largest)), infinity = set1(__builtin_inff());
    const F32x16 per_unit = div(set1(127.0f), amax);
    const F32x16 finite = select_less(per_unit, infinity, div(amax, set1(127.0f)), zero_f32());
    store(scale, select_less(amax, infinity, finite, set1(bits_to_f32(0x7fc00000U))));
    store(inverse, select_less(amax, infinity, select_less(per_unit, infinity, per_unit, zero_f32()), zero_f32()));
  }
};

// Codes of 32 values. With inverse = 0 the products of infinities would be NaN, so nothing is multiplied.
TM_INLINE void codes_of(const float* x, float inverse, I32x16& low, I32x16& high) {
  low = high = zero_i32();
  if (inverse == 0.0f) return;
  low = to_i32(mul(load(x), set1(inverse)));
  high = to_i32(mul(load(x + kLanes), set1(inverse)));
}

TM_INLINE U8x64 quantize_block(const float* x, float low_inverse, float high_inverse, uint8_t* out) {
  I32x16 codes[4];
  codes_of(x, low_inverse, codes[0], codes[1]);
  codes_of(x + 2 * kLanes, high_inverse, codes[2], codes[3]);
  const U8x64 bytes = narrow_to_i8(codes[0], codes[1], codes[2], codes[3]);
  store_u8x64(out, bytes);
  return bytes;
}

// A strip is 16 groups: 512 values, or 4,096. Its sums and scales past the row's end are zero, and so is what stores of
// whole vectors write there: the parts of a row are padded to 64 bytes.
void quantize_groups_of_32(const float* x, int32_t k, const ActivationLayout& layout, uint8_t* out) {
  constexpr int32_t kStripBlocks = kGroups * 32 / kBlock;
  float* scales = reinterpret_cast<float*>(out + layout.scales);
  int32_t* negative_sums = reinterpret_cast<int32_t*>(out + layout.negative_sums);
  float* scaled_sums = reinterpret_cast<float*>(out + layout.scaled_sums);
  const Row row(x, k);
  for (int32_t first = 0; first < row.blocks; first += kStripBlocks, scales += kGroups, negative_sums += kGroups, scaled_sums += kGroups) {
    const int32_t blocks = row.blocks - first < kStripBlocks ? row.blocks - first : kStripBlocks;
    I32x16 largest[kGroups];
    for (int32_t i = 0; i < kStripBlocks; ++i) {
      largest[2 * i] = i < blocks ? larger(row.block(first + i)) : zero_i32();
      largest[2 * i + 1] = i < blocks ? larger(row.block(first + i) + kBlock / 2) : zero_i32();
    }
    const Scales group(largest);
    U8x64 codes[2][4];
    for (int32_t i = 0; i < kStripBlocks; ++i) {
      codes[i / 4][i % 4] = i < blocks ? quantize_block(row.block(first + i), group.inverse[2 * i], group.inverse[2 * i + 1],
                                                        out + (first + i) * kBlock)
                                       : set1_u8(0);
    }
    const I32x16 sums = add_pairs(sums_of_16(codes[0]), sums_of_16(codes[1]));
    store(scales, load(group.scale));
    store(negative_sums, sub(zero_i32(), sums));
    store(scaled_sums, mul(to_f32(sums), load(group.scale)));
  }
}

void quantize_groups_of_256(const float* x, int32_t k, const ActivationLayout& layout, uint8_t* out) {
  constexpr int32_t kGroupBlocks = 256 / kBlock;
  float* scales = reinterpret_cast<float*>(out + layout.scales);
  int32_t* negative_sums = reinterpret_cast<int32_t*>(out + layout.negative_sums);
  int16_t* pairs16 = reinterpret_cast<int16_t*>(out + layout.pairs16);
  int16_t* pairs32 = reinterpret_cast<int16_t*>(out + layout.pairs32);
  int16_t* peaks = reinterpret_cast<int16_t*>(out + layout.peaks);
  const Row row(x, k);
  for (int32_t first = 0; first < row.blocks; first += kGroups * kGroupBlocks, scales += kGroups) {
    const int32_t blocks = row.blocks - first < kGroups * kGroupBlocks ? row.blocks - first : kGroups * kGroupBlocks;
    I32x16 largest[kGroups];
    for (int g = 0; g < kGroups; ++g) largest[g] = zero_i32();
    for (int32_t i = 0; i < blocks; ++i) {
      const float* values = row.block(first + i);
      I32x16& group = largest[i / kGroupBlocks];
      group = max(group, max(larger(values), larger(values + kBlock / 2)));
    }
    const Scales group(largest);
    store(scales, load(group.scale));
    for (int32_t g = 0; g * kGroupBlocks < blocks; ++g, negative_sums += 16, pairs16 += 16, pairs32 += 8, peaks += 2) {
      U8x64 codes[kGroupBlocks], magnitudes[kGroupBlocks];
      for (int32_t i = 0; i < kGroupBlocks; ++i) {
        const int32_t block = g * kGroupBlocks + i;
        codes[i] = block < blocks ? quantize_block(row.block(first + block), group.inverse[g], group.inverse[g],
                                                   out + (first + block) * kBlock)
                                  : set1_u8(0);
        magnitudes[i] = abs_i8(codes[i]);
      }
      const I32x16 sums = sums_of_16(codes), sizes = sums_of_16(magnitudes);
      store(negative_sums, sub(zero_i32(), sums));
      int32_t of_16[16], of_32[16];
      store(of_16, sums);
      const I32x16 sums32 = add_pairs(sums, sums);
      store(of_32, sums32);
      for (int i = 0; i < 16; ++i) pairs16[i] = static_cast<int16_t>(of_16[i]);
      for (int i = 0; i < 8; ++i) pairs32[i] = static_cast<int16_t>(of_32[i]);
      // Magnitudes of one sign: half of all magnitudes and of the sum's.
      const I32x16 of_one_sign = add(add_pairs(sizes, sizes), max(sums32, sub(zero_i32(), sums32)));
      peaks[0] = static_cast<int16_t>(reduce_max(sizes));
      peaks[1] = static_cast<int16_t>(reduce_max(of_one_sign) / 2);
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
  memset(out + layout.scales, 0, layout.bytes - layout.scales);
  if (format == ActivationFormat::kInt8Group32) {
    quantize_groups_of_32(x, k, layout, out);
  } else {
    quantize_groups_of_256(x, k, layout, out);
  }
}

}  // namespace tokenmill::TM_ISA
