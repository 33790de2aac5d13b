// Weights of 16 and 32 bits times fp32 activations (NUMERICS N4): from zero per 256 columns, one chain of fused
// multiply-adds in ascending order per output, block sums added ascending.
#pragma once

#include "kernels/per_isa/linear_shapes.h"

namespace tokenmill::TM_ISA {

struct ElementActivations {
  const float* x;  // first row, first column of the chunk
  size_t stride;   // floats

  TM_INLINE F32x16 at(int row, int column) const { return set1(x[static_cast<size_t>(row) * stride + static_cast<size_t>(column)]); }
  TM_INLINE ElementActivations from_row(int row) const { return {x + static_cast<size_t>(row) * stride, stride}; }
};

struct ElementKind {
  static constexpr int kTileColumns = 64;  // so that a tile stays in the first-level cache
  struct Tile {
    alignas(64) float w[kTileColumns][kTileBlocks][16];
  };
  using Activations = ElementActivations;

  template <int kRows, class Before>
  static TM_INLINE void multiply_tile(const Tile& tile, int columns, const ElementActivations& x, const Before& before,
                                      F32x16 (&acc)[kRows][kTileBlocks]) {
    TM_UNROLL for (int m = 0; m < kRows; ++m) {
      TM_UNROLL for (int n = 0; n < kTileBlocks; ++n) acc[m][n] = before(m, n);
    }
    for (int k = 0; k < columns; ++k) {
      F32x16 w[kTileBlocks];
      TM_UNROLL for (int n = 0; n < kTileBlocks; ++n) w[n] = load(tile.w[k][n]);
      TM_UNROLL for (int m = 0; m < kRows; ++m) {
        const F32x16 value = x.at(m, k);
        TM_UNROLL for (int n = 0; n < kTileBlocks; ++n) acc[m][n] = fma(w[n], value, acc[m][n]);
      }
    }
  }
};

template <WeightFormat kFormat>
struct ElementFormat {
  using Kind = ElementKind;
  static constexpr int kElementBytes = kFormat == WeightFormat::kF32 ? 4 : 2;
  static constexpr int kColumnBytes = kElementBytes * kBlockRows;
  static constexpr int kChunkBytes = kColumnBytes * kChunkColumns;
  static constexpr int kRestartColumns = kChunkColumns;

  static TM_INLINE int chunk_bytes(int columns) { return kColumnBytes * columns; }

  static TM_INLINE ElementActivations activations(const LinearArguments& arguments, int32_t row, int32_t column) {
    const uint8_t* x = arguments.x + static_cast<size_t>(row) * arguments.x_stride;
    return {reinterpret_cast<const float*>(x) + column, arguments.x_stride / sizeof(float)};
  }

  // use(column, weights of 16 rows) for every column of a chunk, ascending.
  template <class Use>
  static TM_INLINE void for_each_column(const uint8_t* chunk, int columns, Use use) {
    if constexpr (kFormat == WeightFormat::kF32) {
      for (int k = 0; k < columns; ++k) use(k, load(reinterpret_cast<const float*>(chunk) + 16 * k));
    } else {
      int k = 0;
      for (; k + 2 <= columns; k += 2) {
        F32x16 even, odd;
        if constexpr (kFormat == WeightFormat::kF16) {
          load_f16_pairs(chunk + kColumnBytes * k, even, odd);
        } else {
          load_bf16_pairs(chunk + kColumnBytes * k, even, odd);
        }
        use(k, even);
        use(k + 1, odd);
      }
      if (k < columns) {
        const uint16_t* last = reinterpret_cast<const uint16_t*>(chunk + kColumnBytes * k);
        use(k, kFormat == WeightFormat::kF16 ? load_f16(last) : load_bf16(last));
      }
    }
  }

  template <int kRows>
  static TM_INLINE void multiply_packed(const uint8_t* chunk, int columns, const ElementActivations& x, bool prefetch_ahead, F32x16 (&acc)[kRows][1]) {
    constexpr int kLineColumns = 64 / kColumnBytes;
    for_each_column(chunk, columns, [&](int k, F32x16 w) TM_UNROLLED {
      if (k % kLineColumns == 0 && prefetch_ahead) prefetch_lines<64>(chunk, static_cast<size_t>(2 * kChunkBytes + kColumnBytes * k));
      TM_UNROLL for (int m = 0; m < kRows; ++m) acc[m][0] = fma(w, x.at(m, k), acc[m][0]);
    });
  }

  static TM_INLINE void unpack(const uint8_t* chunk, int columns, ElementKind::Tile& tile, int block) {
    for_each_column(chunk, columns, [&](int k, F32x16 w) TM_UNROLLED { store(tile.w[k][block], w); });
  }

  static void decode_row(const PackedWeight& weight, int32_t row, float* out) {
    const uint8_t* block = weight.data + static_cast<size_t>(row / kBlockRows) * row_block_bytes(kFormat, weight.k);
    const int lane = row % kBlockRows;
    for_each_column(block, weight.k, [&](int k, F32x16 w) TM_UNROLLED {
      float lanes[16];
      store(lanes, w);
      out[k] = lanes[lane];
    });
  }
};

}  // namespace tokenmill::TM_ISA
