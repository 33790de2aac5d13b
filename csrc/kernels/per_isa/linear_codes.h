// Reading a packed chunk of a quantized format: unsigned codes by quads, scales as floats.
#pragma once

#include "kernels/per_isa/linear_shapes.h"

namespace tokenmill::TM_ISA {

// The scales of one chunk of one row block, expanded; lanes are the 16 rows.
struct alignas(64) ChunkScales {
  float scale[8][16], minimum[8][16];  // groups of 32
  // Super-blocks: the whole number of each scale group, as as_multiplier() gives it or, where sums of pairs are scaled,
  // twice as int16; and its unit; minimums of scale groups 2i and 2i + 1 as two int16.
  int32_t whole_scale[16][16];
  int32_t minimum_pairs[8][16];
  float d[16], negative_dmin[16];
};

// IQ4_NL's code book + 128, in code order.
alignas(16) inline constexpr uint8_t kIq4NlPlus128[16] = {1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241};

// Whether a super-block's sums of pairs are scaled as they are: all of the dot product must be in them.
template <int kDotBits>
constexpr bool scales_pairs(int code_offset) { return code_offset == 0 && QuadSum<kDotBits>::kOfPairs; }

template <WeightFormat kFormat>
struct PackedCodes {
  static constexpr ChunkLayout kLayout = chunk_layout(kFormat);
  static constexpr int kBits = kLayout.code_bits;

  static constexpr bool kScalesPairs = scales_pairs<dot_bits(kBits)>(kLayout.code_offset);
  static constexpr int kChunkBytes = chunk_planes(kLayout, kChunkColumns / kGroupColumns).bytes;

  const uint8_t* chunk;
  ChunkPlanes planes;
  bool prefetch_ahead;  // see begin_group

  TM_INLINE PackedCodes(const uint8_t* data, int groups, bool prefetch = false)
      : chunk(data), planes(chunk_planes(kLayout, groups)), prefetch_ahead(prefetch) {}

  // Prefetches one group's share of the chunk after the next one.
  TM_INLINE void begin_group(int group) const {
    if (!prefetch_ahead) return;
    constexpr int kShare = (kChunkBytes / 64 + 7) / 8 * 64;
    prefetch_lines<kShare>(chunk, static_cast<size_t>(2 * kChunkBytes + kShare * group));
  }

  // Unsigned codes of quad j of a group; the number that they stand for is code - offset().
  template <int j>
  TM_INLINE U8x64 quad(int block, int group) const {
    (void)block;
    if constexpr (kBits == 8) {
      return load_u8x64(chunk + planes.codes8 + 512 * group + 64 * j);
    } else if constexpr (kBits == 2 || kBits == 3) {
      const U8x64 low = low2<j>(group);
      if constexpr (kBits == 2) return low;
      return bit_or(low, bit_and(shifted<2 - j>(load_u8x64(chunk + planes.codes1 + 64 * group)), set1_u8(4)));
    } else {
      const U8x64 pair = load_u8x64(chunk + planes.codes4 + 256 * group + 64 * (j % 4));
      const U8x64 low = bit_and(shifted<j < 4 ? 0 : -4>(pair), set1_u8(15));
      if constexpr (kFormat == WeightFormat::kIq4Nl) {
        return lookup16(kIq4NlPlus128, low);
      } else if constexpr (kBits == 5) {
        return bit_or(low, bit_and(shifted<4 - j>(load_u8x64(chunk + planes.codes1 + 64 * group)), set1_u8(16)));
      } else if constexpr (kBits == 6) {
        const U8x64 high = load_u8x64(chunk + planes.codes2 + 128 * group + 64 * (j / 4));
        return bit_or(low, bit_and(shifted<4 - 2 * (j % 4)>(high), set1_u8(0x30)));
      } else {
        return low;
      }
    }
  }

  TM_INLINE void expand_scales(int groups, ChunkScales& out) const {
    if constexpr (!kLayout.super_block()) {
      for (int g = 0; g < groups; ++g) store(out.scale[g], load_f16(halves(planes.d) + 16 * g));
      if constexpr (kLayout.has_minimum) {
        for (int g = 0; g < groups; ++g) store(out.minimum[g], load_f16(halves(planes.m) + 16 * g));
      }
    } else {
      store(out.d, load_f16(halves(planes.d)));
      expand_whole_scales(out);
      if constexpr (kLayout.has_minimum) store(out.negative_dmin, sub(set1(-0.0f), load_f16(halves(planes.m))));
    }
  }

 private:
  // Bits moved up by kBits (down if negative); bits that cross bytes must be masked off.
  template <int kShift>
  static TM_INLINE U8x64 shifted(U8x64 a) {
    if constexpr (kShift > 0) {
      return shift_left_u16<kShift>(a);
    } else if constexpr (kShift < 0) {
      return shift_right_u16<-kShift>(a);
    } else {
      return a;
    }
  }

  template <int j>
  TM_INLINE U8x64 low2(int group) const {
    return bit_and(shifted<-2 * (j % 4)>(load_u8x64(chunk + planes.codes2 + 128 * group + 64 * (j / 4))), set1_u8(3));
  }

  TM_INLINE const uint16_t* halves(int at) const { return reinterpret_cast<const uint16_t*>(chunk + at); }

  TM_INLINE void expand_whole_scales(ChunkScales& out) const {
    constexpr int kScales = kChunkColumns / kLayout.scale_columns;
    const uint8_t* packed = chunk + planes.scales;
    alignas(64) uint8_t codes[512];  // scales, then minimums
    const U8x64 nibble = set1_u8(15);
    if constexpr (kLayout.scales == ScaleCoding::kSixBits) {
      const U8x64 low02 = load_u8x64(packed), low13 = load_u8x64(packed + 64), high = load_u8x64(packed + 128);
      const U8x64 upper = set1_u8(0x30);
      store_u8x64(codes, bit_or(bit_and(low02, nibble), bit_and(shifted<4>(high), upper)));
      store_u8x64(codes + 64, bit_or(bit_and(low13, nibble), bit_and(shifted<2>(high), upper)));
      store_u8x64(codes + 128, bit_or(bit_and(shifted<-4>(low02), nibble), bit_and(high, upper)));
      store_u8x64(codes + 192, bit_or(bit_and(shifted<-4>(low13), nibble), bit_and(shifted<-2>(high), upper)));
    } else if constexpr (kLayout.scales == ScaleCoding::kFourPlusFour) {
      for (int i = 0; i < 256; i += 64) {
        const U8x64 both = load_u8x64(packed + i);
        store_u8x64(codes + i, bit_and(both, nibble));
        store_u8x64(codes + 256 + i, bit_and(shifted<-4>(both), nibble));
      }
    }
    for (int g = 0; g < kScales; ++g) {
      I32x16 scale;
      if constexpr (kLayout.scales == ScaleCoding::kInt8) {
        scale = load_i8_as_i32(reinterpret_cast<const int8_t*>(packed) + 16 * g);
      } else {
        scale = load_u8_as_i32(codes + 16 * g);
        if constexpr (kFormat == WeightFormat::kQ3K) scale = sub(scale, set1_i32(32));
      }
      store(out.whole_scale[g], kScalesPairs ? add(scale, shift_left<16>(scale)) : as_multiplier(scale));
    }
    if constexpr (kLayout.has_minimum) {
      for (int i = 0; i < kScales / 2; ++i) store(out.minimum_pairs[i], load_u8_as_i16_pairs(codes + 16 * kScales + 32 * i));
    }
  }
};

}  // namespace tokenmill::TM_ISA
