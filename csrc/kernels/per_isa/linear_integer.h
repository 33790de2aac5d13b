// Integer dot products of quantized weights and int8 activations (NUMERICS N3): the one definition of the sequence of
// floating-point operations that an output sees, shared by every row count, tile shape and weight format.
#pragma once

#include "kernels/per_isa/linear_codes.h"

namespace tokenmill::TM_ISA {

TM_INLINE float load_f32(const uint8_t* p) {
  float value;
  memcpy(&value, p, 4);
  return value;
}

// The activations of one chunk: each part points to its values of the first row (see ActivationLayout).
struct ChunkActivations {
  const uint8_t* codes;
  const uint8_t* scales;
  const uint8_t* negative_sums;
  const uint8_t* scaled_sums;
  const uint8_t* pairs;
  const uint8_t* peaks;
  size_t stride;

  TM_INLINE const uint8_t* quad(int row, int group, int j) const { return codes + static_cast<size_t>(row) * stride + 32 * group + 4 * j; }
  TM_INLINE F32x16 scale(int row, int group) const { return set1(load_f32(scales + static_cast<size_t>(row) * stride + 4 * group)); }
  TM_INLINE int32_t negative_sum(int row, int index) const { return load_i32(negative_sums + static_cast<size_t>(row) * stride + 4 * index); }
  TM_INLINE F32x16 scaled_sum(int row, int group) const { return set1(load_f32(scaled_sums + static_cast<size_t>(row) * stride + 4 * group)); }
  TM_INLINE const uint8_t* pair(int row, int index) const { return pairs + static_cast<size_t>(row) * stride + 4 * index; }

  // Super-blocks: the largest dot product of a scale group is at most this times the largest code.
  TM_INLINE int32_t peak(int row) const {
    int16_t value;
    memcpy(&value, peaks + static_cast<size_t>(row) * stride, 2);
    return value;
  }

  TM_INLINE ChunkActivations from_row(int row) const {
    const size_t skip = static_cast<size_t>(row) * stride;
    return {codes + skip, scales + skip, negative_sums + skip, scaled_sums + skip, pairs + skip, peaks + skip, stride};
  }
};

constexpr int log2_of(int power) { return power <= 1 ? 0 : 1 + log2_of(power / 2); }

// What decides the arithmetic of a format; formats of one kind share the many-row kernel. Either codes have an offset, a
// power of two, or the format has a minimum (kOffset = 0).
template <bool kSuperBlock, int kScaleColumns, int kOffset, int kCodeBits, int kDotBits>
struct IntegerKind {
  using Sum = QuadSum<kDotBits>;
  static constexpr bool kHasMinimum = kOffset == 0;
  // Codes of `kTileBlocks` row blocks, unpacked, beside their scales.
  struct Tile {
    alignas(64) uint8_t codes[kChunkColumns / 4][kTileBlocks][64];
    ChunkScales scales[kTileBlocks];

    template <int j>
    TM_INLINE U8x64 quad(int block, int group) const { return load_u8x64(codes[8 * group + j][block]); }
    TM_INLINE void begin_group(int) const {}
  };

  using Activations = ChunkActivations;

  // acc[m][n] = before(m, n) + the products of one chunk. A super-block needs `before` at its end only, when registers
  // are free again.
  template <int kRows, class Before>
  static TM_INLINE void multiply_tile(const Tile& tile, int columns, const ChunkActivations& x, const Before& before,
                                      F32x16 (&acc)[kRows][kTileBlocks]) {
    multiply<kRows, kTileBlocks>(tile, tile.scales, columns / kGroupColumns, x, before, acc);
  }

  template <int kRows, int kBlocks, class Codes, class Before>
  static TM_INLINE void multiply(const Codes& codes, const ChunkScales* scales, int groups, const ChunkActivations& x,
                                 const Before& before, F32x16 (&acc)[kRows][kBlocks]) {
    if constexpr (!kSuperBlock) {
      TM_UNROLL for (int m = 0; m < kRows; ++m) {
        TM_UNROLL for (int n = 0; n < kBlocks; ++n) acc[m][n] = before(m, n);
      }
      multiply_groups<kRows, kBlocks>(codes, scales, groups, x, acc);
    } else if (dots_fit_i16(kRows, x)) {
      multiply_super_block<kRows, kBlocks, true>(codes, scales, x, before, acc);
    } else {
      multiply_super_block<kRows, kBlocks, false>(codes, scales, x, before, acc);
    }
  }

 private:
  static constexpr bool kScalesPairs = scales_pairs<kDotBits>(kOffset);
  static constexpr int kMostCode = kHasMinimum ? (1 << kCodeBits) - 1 : kOffset;

  // Whether the dot products of a scale group lie in -32,767..32,767, whatever the codes: the multiplication by their
  // scales then takes one instruction, and not three. With real activations they nearly always do.
  static TM_INLINE bool dots_fit_i16([[maybe_unused]] int rows, [[maybe_unused]] const ChunkActivations& x) {
    if constexpr (kScalesPairs) return true;
    if constexpr (kMostCode * 127 * kScaleColumns <= 32767) return true;
    if constexpr (!kHasMultiplyAddI16) return false;
    bool fit = true;
    for (int m = 0; m < rows; ++m) fit &= x.peak(m) <= 32767 / kMostCode;
    return fit;
  }

  // dot[m][n] = the exact dot product of quads begin .. end - 1 of a group; `sum_index` names their sum of activations.
  template <int kRows, int kBlocks, int kBegin, int kEnd, class Codes>
  static TM_INLINE void dot_quads(const Codes& codes, int group, int sum_index, const ChunkActivations& x,
                                  I32x16 (&dot)[kRows][kBlocks]) {
    TM_UNROLL for (int m = 0; m < kRows; ++m) {
      I32x16 start = zero_i32();
      if constexpr (!kHasMinimum) start = shift_left<log2_of(kOffset)>(set1_i32(x.negative_sum(m, sum_index)));
      TM_UNROLL for (int n = 0; n < kBlocks; ++n) dot[m][n] = start;
    }
    const auto total = [](const Sum& sum, int) TM_UNROLLED { return sum.total(); };
    add_quads<kRows, kBlocks, kBegin, kEnd>(codes, group, x, total, dot);
  }

  // dot[m][n] = total(dot[m][n] + that dot product, n), for as many quads at a time as a sum holds.
  template <int kRows, int kBlocks, int kBegin, int kEnd, class Codes, class Total>
  static TM_INLINE void add_quads(const Codes& codes, int group, const ChunkActivations& x, const Total& total,
                                  I32x16 (&dot)[kRows][kBlocks]) {
    constexpr int kQuads = kEnd - kBegin < Sum::kMost ? kEnd - kBegin : Sum::kMost;
    unroll<(kEnd - kBegin) / kQuads>([&](auto part) TM_UNROLLED {
      Sum sums[kRows][kBlocks];
      TM_UNROLL for (int m = 0; m < kRows; ++m) {
        TM_UNROLL for (int n = 0; n < kBlocks; ++n) sums[m][n].begin(dot[m][n]);
      }
      unroll<kQuads>([&](auto i) TM_UNROLLED {
        constexpr int j = kBegin + decltype(part)::value * kQuads + decltype(i)::value;
        U8x64 w[kBlocks];
        TM_UNROLL for (int n = 0; n < kBlocks; ++n) w[n] = codes.template quad<j>(n, group);
        TM_UNROLL for (int m = 0; m < kRows; ++m) add_quad<kBlocks>(x.quad(m, group, j), w, sums[m]);
      });
      TM_UNROLL for (int m = 0; m < kRows; ++m) {
        TM_UNROLL for (int n = 0; n < kBlocks; ++n) dot[m][n] = total(sums[m][n], n);
      }
    });
  }

  template <int kBlocks>
  static TM_INLINE void add_quad(const uint8_t* quad, const U8x64 (&w)[kBlocks], Sum (&sums)[kBlocks]) {
    if constexpr (kBlocks == 1) {
      sums[0].add_from(quad, w[0]);
    } else {
      const int32_t broadcast = load_i32(quad);
      TM_UNROLL for (int n = 0; n < kBlocks; ++n) sums[n].add(broadcast, w[n]);
    }
  }

  template <int kRows, int kBlocks, class Codes>
  static TM_INLINE void multiply_groups(const Codes& codes, const ChunkScales* scales, int groups, const ChunkActivations& x,
                                        F32x16 (&acc)[kRows][kBlocks]) {
    for (int g = 0; g < groups; ++g) {
      codes.begin_group(g);
      I32x16 dot[kRows][kBlocks];
      dot_quads<kRows, kBlocks, 0, 8>(codes, g, g, x, dot);
      TM_UNROLL for (int n = 0; n < kBlocks; ++n) {
        const F32x16 scale = load(scales[n].scale[g]);
        TM_UNROLL for (int m = 0; m < kRows; ++m) acc[m][n] = fma(mul(to_f32(dot[m][n]), x.scale(m, g)), scale, acc[m][n]);
        if constexpr (kHasMinimum) {
          const F32x16 minimum = load(scales[n].minimum[g]);
          TM_UNROLL for (int m = 0; m < kRows; ++m) acc[m][n] = fma(x.scaled_sum(m, g), minimum, acc[m][n]);
        }
      }
    }
  }

  template <int kRows, int kBlocks, bool kFitI16, class Codes, class Before>
  static TM_INLINE void multiply_super_block(const Codes& codes, const ChunkScales* scales, const ChunkActivations& x,
                                             const Before& before, F32x16 (&acc)[kRows][kBlocks]) {
    I32x16 p[kRows][kBlocks];
    TM_UNROLL for (int m = 0; m < kRows; ++m) {
      TM_UNROLL for (int n = 0; n < kBlocks; ++n) p[m][n] = zero_i32();
    }
    for (int g = 0; g < kChunkColumns / kGroupColumns; ++g) {
      codes.begin_group(g);
      if constexpr (kScaleColumns == 32) {
        add_scaled<kRows, kBlocks, kFitI16, 0, 8>(codes, scales, g, g, x, p);
      } else {
        add_scaled<kRows, kBlocks, kFitI16, 0, 4>(codes, scales, g, 2 * g, x, p);
        add_scaled<kRows, kBlocks, kFitI16, 4, 8>(codes, scales, g, 2 * g + 1, x, p);
      }
    }
    TM_UNROLL for (int n = 0; n < kBlocks; ++n) {
      const F32x16 d = load(scales[n].d);
      F32x16 sums[kRows];
      TM_UNROLL for (int m = 0; m < kRows; ++m) sums[m] = mul(to_f32(p[m][n]), d);
      if constexpr (kHasMinimum) {
        const F32x16 negative_dmin = load(scales[n].negative_dmin);
        I32x16 minimum_sums[kRows];
        TM_UNROLL for (int m = 0; m < kRows; ++m) minimum_sums[m] = zero_i32();
        TM_UNROLL for (int i = 0; i < kChunkColumns / kScaleColumns / 2; ++i) {
          const I32x16 minimums = load(scales[n].minimum_pairs[i]);
          TM_UNROLL for (int m = 0; m < kRows; ++m) minimum_sums[m] = dot2_from(minimum_sums[m], minimums, x.pair(m, i));
        }
        TM_UNROLL for (int m = 0; m < kRows; ++m) sums[m] = fma(to_f32(minimum_sums[m]), negative_dmin, sums[m]);
      }
      TM_UNROLL for (int m = 0; m < kRows; ++m) acc[m][n] = fma(sums[m], x.scale(m, 0), before(m, n));
    }
  }

  template <int kRows, int kBlocks, bool kFitI16, int kBegin, int kEnd, class Codes>
  static TM_INLINE void add_scaled(const Codes& codes, const ChunkScales* scales, int group, int scale_index,
                                   const ChunkActivations& x, I32x16 (&p)[kRows][kBlocks]) {
    if constexpr (kScalesPairs) {
      const auto total = [&](const Sum& sum, int n) TM_UNROLLED { return sum.total_times(load(scales[n].whole_scale[scale_index])); };
      add_quads<kRows, kBlocks, kBegin, kEnd>(codes, group, x, total, p);
    } else {
      I32x16 dot[kRows][kBlocks];
      dot_quads<kRows, kBlocks, kBegin, kEnd>(codes, group, scale_index, x, dot);
      TM_UNROLL for (int n = 0; n < kBlocks; ++n) {
        const I32x16 scale = load(scales[n].whole_scale[scale_index]);
        TM_UNROLL for (int m = 0; m < kRows; ++m) p[m][n] = multiply_add<kFitI16>(p[m][n], dot[m][n], scale);
      }
    }
  }
};

// A quantized format, as the drivers of linear_drivers.h see it.
template <WeightFormat kFormat>
struct QuantizedFormat {
  static constexpr ChunkLayout kLayout = chunk_layout(kFormat);
  static constexpr int kRestartColumns = kSegmentColumns;  // accumulators start from zero again
  static constexpr int kChunkBytes = PackedCodes<kFormat>::kChunkBytes;
  // IQ4_NL's codes become bytes by its table.
  static constexpr int kDotBits = dot_bits(kFormat == WeightFormat::kIq4Nl ? 8 : kLayout.code_bits);
  using Kind = IntegerKind<kLayout.super_block(), kLayout.scale_columns, kLayout.code_offset,
                           kLayout.super_block() ? kLayout.code_bits : 0, kDotBits>;
  using Tile = typename Kind::Tile;

  static TM_INLINE int chunk_bytes(int columns) {
    return kLayout.super_block() ? kChunkBytes : kChunkBytes / 8 * (columns / kGroupColumns);
  }

  // Activations of rows row.. and columns column..
  static TM_INLINE ChunkActivations activations(const LinearArguments& arguments, int32_t row, int32_t column) {
    constexpr ActivationFormat kActivation =
        kLayout.super_block() ? ActivationFormat::kInt8Group256 : ActivationFormat::kInt8Group32;
    const ActivationLayout at = activation_layout(kActivation, arguments.weight.k);
    const uint8_t* x = arguments.x + static_cast<size_t>(row) * arguments.x_stride;
    const int groups = column / kGroupColumns;
    ChunkActivations out{};
    out.codes = x + column;
    out.stride = arguments.x_stride;
    if constexpr (kLayout.super_block()) {
      out.scales = x + at.scales + column / kChunkColumns * 4;
      out.negative_sums = x + at.negative_sums + groups * 8;
      out.peaks = x + at.peaks + column / kChunkColumns * 4 + (kLayout.scale_columns == 32 ? 2 : 0);
      out.pairs = kLayout.scale_columns == 32 ? x + at.pairs32 + groups * 2 : x + at.pairs16 + groups * 4;
    } else {
      out.scales = x + at.scales + groups * 4;
      out.negative_sums = x + at.negative_sums + groups * 4;
      out.scaled_sums = x + at.scaled_sums + groups * 4;
    }
    return out;
  }

  template <int kRows>
  static TM_INLINE void multiply_packed(const uint8_t* chunk, int columns, const ChunkActivations& x, bool prefetch, F32x16 (&acc)[kRows][1]) {
    const int groups = kLayout.super_block() ? kChunkColumns / kGroupColumns : columns / kGroupColumns;
    const PackedCodes<kFormat> codes(chunk, groups, prefetch);
    ChunkScales scales;
    codes.expand_scales(groups, scales);
    const auto before = [&](int m, int n) TM_UNROLLED { return acc[m][n]; };
    Kind::template multiply<kRows, 1>(codes, &scales, groups, x, before, acc);
  }

  static TM_INLINE void unpack(const uint8_t* chunk, int columns, Tile& tile, int block) {
    const int groups = columns / kGroupColumns;
    const PackedCodes<kFormat> codes(chunk, groups);
    codes.expand_scales(groups, tile.scales[block]);
    for (int g = 0; g < groups; ++g) {
      unroll<8>([&](auto j) TM_UNROLLED {
        store_u8x64(tile.codes[8 * g + j][block], codes.template quad<decltype(j)::value>(0, g));
      });
    }
  }

  static void decode_row(const PackedWeight& weight, int32_t row, float* out);
};

// The file format's reference decoding, operation by operation: (d * scale) * q - dmin * minimum.
template <WeightFormat kFormat>
void QuantizedFormat<kFormat>::decode_row(const PackedWeight& weight, int32_t row, float* out) {
  const uint8_t* chunk = weight.data + static_cast<size_t>(row / kBlockRows) * row_block_bytes(kFormat, weight.k);
  const int lane = row % kBlockRows;
  for (int32_t column = 0; column < weight.k; column += kChunkColumns) {
    const int columns = weight.k - column < kChunkColumns ? weight.k - column : kChunkColumns;
    const int groups = columns / kGroupColumns;
    const PackedCodes<kFormat> codes(chunk, groups);
    ChunkScales scales;
    codes.expand_scales(groups, scales);
    for (int g = 0; g < groups; ++g) {
      alignas(64) uint8_t quads[8][64];
      unroll<8>([&](auto j) TM_UNROLLED { store_u8x64(quads[j], codes.template quad<decltype(j)::value>(0, g)); });
      for (int i = 0; i < kGroupColumns; ++i) {
        const int index = (32 * g + i) / kLayout.scale_columns;
        const float q = static_cast<float>(quads[i / 4][4 * lane + i % 4] - kLayout.code_offset);
        float value;
        if constexpr (kLayout.super_block()) {
          value = scales.d[lane] * static_cast<float>(static_cast<int16_t>(scales.whole_scale[index][lane])) * q;
        } else {
          value = scales.scale[index][lane] * q;
        }
        if constexpr (kLayout.has_minimum && kLayout.super_block()) {
          const int32_t minimum = (scales.minimum_pairs[index / 2][lane] >> (16 * (index % 2))) & 0xffff;
          value = value + scales.negative_dmin[lane] * static_cast<float>(minimum);
        } else if constexpr (kLayout.has_minimum) {
          value = value + scales.minimum[index][lane];
        }
        out[column + 32 * g + i] = value;
      }
    }
    chunk += chunk_bytes(columns);
  }
}

}  // namespace tokenmill::TM_ISA
