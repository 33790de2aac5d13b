// The element formats of weight matrices, and the packed layout of each.
//
// A packed matrix is a sequence of row blocks: 16 output rows, all of K, in chunks of 256 columns. Groups of 32 may
// leave a short last chunk. A chunk holds exactly the bits that the file holds for these rows and columns, in planes:
//
//   codes4   [groups][4][64]  low nibble: quad j of vector j, high nibble: quad j + 4
//   codes8   [groups][8][64]  vector j: quad j, as unsigned (int8 + 128)
//   codes2   [groups][2][64]  vector v, bits 2t and 2t + 1: quad 4v + t
//   codes1   [groups][64]     bit j: quad j
//   scales   super-blocks only: the integer scales and minimums of 16 rows (see ScaleCoding)
//   d        fp16 [groups][16] for groups of 32, fp16 [16] for super-blocks
//   m        fp16, as d: the minimum (groups of 32) or the minimums' scale (super-blocks); absent in some formats
//
// A group is 32 columns, a quad is 4 columns of 16 rows: byte 4r + i is row r, column 4j + i, which is what one
// four-element dot product of 16 lanes consumes. Elements of 16 bits lie as [columns/2][16][2], of 32 bits as
// [columns][16]; the last column of an odd K lies alone.
#pragma once

#include <cstddef>
#include <cstdint>

#define TM_LAYOUT_INLINE inline constexpr __attribute__((always_inline))

namespace tokenmill {

// Numbers are ours (the packed layout's), not GGUF's.
enum class WeightFormat : int32_t {
  kF32 = 0, kF16 = 1, kBf16 = 2,
  kQ4_0 = 3, kQ4_1 = 4, kQ5_0 = 5, kQ5_1 = 6, kQ8_0 = 7, kIq4Nl = 8,  // groups of 32
  kQ2K = 9, kQ3K = 10, kQ4K = 11, kQ5K = 12, kQ6K = 13,               // super-blocks of 256
};

inline constexpr int kWeightFormatCount = 14;

// Which activation a format multiplies (NUMERICS N2): kF32, or int8 with one scale per 32 or 256 values of K.
enum class ActivationFormat : int32_t { kF32 = 0, kInt8Group32 = 1, kInt8Group256 = 2 };

inline constexpr int kBlockRows = 16;      // rows of a row block
inline constexpr int kChunkColumns = 256;  // columns of a chunk
inline constexpr int kGroupColumns = 32;   // columns of a group
inline constexpr int kSegmentColumns = 2048;  // accumulators restart here (NUMERICS N3)

// How the integer scales of a super-block chunk are stored: 256 codes c in one vector order, cut into quarters of 64.
enum class ScaleCoding : uint8_t {
  kNone,
  // 192 bytes: [2][64] nibbles (low: quarters 0 and 1, high: quarters 2 and 3), then [64], bits 2t and 2t + 1: the upper
  // bits of quarter t. Codes: scales [groups][16], then, with minimums, those as [groups/2][16][2].
  kSixBits,
  // 256 bytes: low nibbles the scales [16][16], high nibbles the minimums [8][16][2].
  kFourPlusFour,
  // 256 bytes: int8 scales [16][16].
  kInt8,
};

struct ChunkLayout {
  uint8_t block_columns;   // columns of one block of the file, minus 1 (so that 256 fits)
  uint8_t source_bytes;    // bytes of one block of the file
  uint8_t code_bits;       // 4, 5, 6, 8, 2 or 3
  ScaleCoding scales;
  bool has_minimum;
  int16_t code_offset;     // subtracted from the unsigned code: 0 or a power of two
  uint8_t scale_columns;   // columns that share one scale: 32 or 16

  constexpr bool super_block() const { return scales != ScaleCoding::kNone; }
};

// Of the quantized formats.
TM_LAYOUT_INLINE ChunkLayout chunk_layout(WeightFormat format) {
  switch (format) {
    case WeightFormat::kQ4_0: return {31, 18, 4, ScaleCoding::kNone, false, 8, 32};
    case WeightFormat::kQ4_1: return {31, 20, 4, ScaleCoding::kNone, true, 0, 32};
    case WeightFormat::kQ5_0: return {31, 22, 5, ScaleCoding::kNone, false, 16, 32};
    case WeightFormat::kQ5_1: return {31, 24, 5, ScaleCoding::kNone, true, 0, 32};
    case WeightFormat::kQ8_0: return {31, 34, 8, ScaleCoding::kNone, false, 128, 32};
    case WeightFormat::kIq4Nl: return {31, 18, 4, ScaleCoding::kNone, false, 128, 32};  // offset of its table's values
    case WeightFormat::kQ2K: return {255, 84, 2, ScaleCoding::kFourPlusFour, true, 0, 16};
    case WeightFormat::kQ3K: return {255, 110, 3, ScaleCoding::kSixBits, false, 4, 16};
    case WeightFormat::kQ4K: return {255, 144, 4, ScaleCoding::kSixBits, true, 0, 32};
    case WeightFormat::kQ5K: return {255, 176, 5, ScaleCoding::kSixBits, true, 0, 32};
    case WeightFormat::kQ6K: return {255, 210, 6, ScaleCoding::kInt8, false, 32, 16};
    default: return {};
  }
}

// Where the planes of a chunk of `groups` groups begin, in bytes.
struct ChunkPlanes {
  int codes4, codes8, codes2, codes1, scales, d, m, bytes;
};

TM_LAYOUT_INLINE ChunkPlanes chunk_planes(ChunkLayout layout, int groups) {
  const int bits = layout.code_bits;
  ChunkPlanes planes{};
  int at = 0;
  planes.codes4 = at;
  at += (bits == 4 || bits == 5 || bits == 6) ? 256 * groups : 0;
  planes.codes8 = at;
  at += bits == 8 ? 512 * groups : 0;
  planes.codes2 = at;
  at += (bits == 2 || bits == 3 || bits == 6) ? 128 * groups : 0;
  planes.codes1 = at;
  at += (bits == 3 || bits == 5) ? 64 * groups : 0;
  planes.scales = at;
  at += layout.scales == ScaleCoding::kNone ? 0 : layout.scales == ScaleCoding::kSixBits ? 192 : 256;
  planes.d = at;
  const int halves = 32 * (layout.super_block() ? 1 : groups);
  at += halves;
  planes.m = at;
  at += layout.has_minimum ? halves : 0;
  planes.bytes = at;
  return planes;
}

// Where the parts of an activation row of k values begin, in bytes; each part is aligned to 64.
//   codes          int8 [k], zero up to the part's end
//   scales         fp32 [groups]
//   negative_sums  int32, -(sum of codes): [k/32] (kInt8Group32) or [k/16] (kInt8Group256)
//   scaled_sums    kInt8Group32: fp32 [k/32], sum * scale
//   pairs16        kInt8Group256: int16 [k/16], sums of 16 codes
//   pairs32        kInt8Group256: int16 [k/32], sums of 32 codes
//   peaks          kInt8Group256: int16 [k/256][2], the largest sum over 16 codes of their magnitudes, and the largest
//                  over 32 codes of those of one sign
struct ActivationLayout {
  size_t scales, negative_sums, scaled_sums, pairs16, pairs32, peaks, bytes;
};

TM_LAYOUT_INLINE size_t round_up_64(size_t bytes) { return (bytes + 63) / 64 * 64; }

TM_LAYOUT_INLINE ActivationLayout activation_layout(ActivationFormat format, int32_t k) {
  const size_t columns = static_cast<size_t>(k);
  ActivationLayout layout{};
  if (format == ActivationFormat::kF32) {
    layout.bytes = round_up_64(columns * 4);
    return layout;
  }
  layout.scales = round_up_64(columns);
  if (format == ActivationFormat::kInt8Group32) {
    const size_t part = round_up_64((columns + 31) / 32 * 4);
    layout.negative_sums = layout.scales + part;
    layout.scaled_sums = layout.negative_sums + part;
    layout.bytes = layout.scaled_sums + part;
  } else {
    layout.negative_sums = layout.scales + round_up_64((columns + 255) / 256 * 4);
    layout.pairs16 = layout.negative_sums + round_up_64((columns + 15) / 16 * 4);
    layout.pairs32 = layout.pairs16 + round_up_64((columns + 15) / 16 * 2);
    layout.peaks = layout.pairs32 + round_up_64((columns + 31) / 32 * 2);
    layout.bytes = layout.peaks + round_up_64((columns + 255) / 256 * 4);
  }
  return layout;
}

}  // namespace tokenmill
