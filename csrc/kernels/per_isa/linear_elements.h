// Weights of 16 and 32 bits times fp32 activations (NUMERICS N4): from zero per 256 columns, one chain of fused
// multiply-adds in ascending order per output, block sums added ascending.
//
// A group of row blocks is multiplied chunk by chunk, so that a chunk's activations stay in the first-level cache while
// the group's weights pass by. They are copied first: then one address serves all rows, and rows that lie a power of two
// apart do not share a few sets of the cache. Few rows multiply the packed elements, which are converted in registers.
// More rows share weights that were converted once, in register tiles of several row blocks. Sums of chunks wait in
// scratch.
#pragma once

#include "kernels/per_isa/linear_drivers.h"

namespace tokenmill::TM_ISA {

// Packed elements of 16 rows: 16 bits with two columns side by side, or floats column by column.
template <WeightFormat kFormat>
struct PackedElements {
  static constexpr bool kPairs = kFormat != WeightFormat::kF32;
  static constexpr int kColumnBytes = kBlockRows * (kPairs ? 2 : 4);
  static constexpr int kChunkBytes = kColumnBytes * kChunkColumns;

  static TM_INLINE void load_pair(const uint8_t* p, F32x16& even, F32x16& odd) {
    if constexpr (kFormat == WeightFormat::kF16) {
      load_f16_pairs(p, even, odd);
    } else {
      load_bf16_pairs(p, even, odd);
    }
  }

  // A column of floats, or the last one of an odd K.
  static TM_INLINE F32x16 load_one(const uint8_t* p) {
    if constexpr (kFormat == WeightFormat::kF32) return load(reinterpret_cast<const float*>(p));
    const uint16_t* halves = reinterpret_cast<const uint16_t*>(p);
    return kFormat == WeightFormat::kF16 ? load_f16(halves) : load_bf16(halves);
  }

  // out[column] = the 16 rows' weights.
  static void convert(const uint8_t* packed, int columns, float (*out)[kBlockRows]) {
    int k = 0;
    if constexpr (kPairs) {
      for (; k + 2 <= columns; k += 2) {
        F32x16 even, odd;
        load_pair(packed + kColumnBytes * k, even, odd);
        store(out[k], even);
        store(out[k + 1], odd);
      }
    }
    for (; k < columns; ++k) store(out[k], load_one(packed + kColumnBytes * k));
  }
};

// What a kernel multiplies: the columns of one chunk, a panel of rows, one or more row blocks.
struct ElementPanel {
  const float* x;  // [rows][kChunkColumns]
  const uint8_t* weights;
  size_t weights_stride;  // bytes between row blocks
  int columns;
  bool first_chunk;           // there are no sums yet
  float (*sums)[kBlockRows];  // of the chunks so far, of the panel's first row and row block
  int sums_stride;            // vectors between rows
  const uint8_t* ahead;       // prefetched from here on, ahead_step bytes with every two columns
  size_t ahead_step;
  size_t ahead_stride;        // bytes between row blocks
};

template <class Weights, int kRows, int kBlocks>
__attribute__((noinline)) void multiply_panel(const ElementPanel& panel) {
  constexpr int kAheadLines = kBlocks == 1 ? 2 * Weights::kColumnBytes / 64 : 1;  // a packed stream is prefetched whole
  F32x16 acc[kRows][kBlocks];
  TM_UNROLL for (int m = 0; m < kRows; ++m) {
    TM_UNROLL for (int n = 0; n < kBlocks; ++n) acc[m][n] = zero_f32();
  }
  const float* x = panel.x;
  const uint8_t* weights = panel.weights;
  const uint8_t* ahead = panel.ahead;
  const size_t weights_stride = panel.weights_stride, ahead_step = panel.ahead_step, ahead_stride = panel.ahead_stride;
  const float* const end = x + panel.columns / 2 * 2;
  const auto multiply = [&](const F32x16 (&w)[kBlocks], const float* column) TM_UNROLLED {
    TM_UNROLL for (int m = 0; m < kRows; ++m) {
      const F32x16 value = set1(column[kChunkColumns * m]);
      TM_UNROLL for (int n = 0; n < kBlocks; ++n) acc[m][n] = fma(w[n], value, acc[m][n]);
    }
  };
  const auto multiply_one = [&](const uint8_t* from, const float* column) TM_UNROLLED {
    F32x16 w[kBlocks];
    TM_UNROLL for (int n = 0; n < kBlocks; ++n) w[n] = Weights::load_one(from + static_cast<size_t>(n) * weights_stride);
    multiply(w, column);
  };
  for (; x != end; x += 2, weights += 2 * Weights::kColumnBytes, ahead += ahead_step) {
    TM_UNROLL for (int n = 0; n < kBlocks; ++n) {
      TM_UNROLL for (int line = 0; line < kAheadLines; ++line) prefetch(ahead + static_cast<size_t>(n) * ahead_stride + 64 * line);
    }
    if constexpr (Weights::kPairs) {
      F32x16 even[kBlocks], odd[kBlocks];
      TM_UNROLL for (int n = 0; n < kBlocks; ++n) Weights::load_pair(weights + static_cast<size_t>(n) * weights_stride, even[n], odd[n]);
      multiply(even, x);
      multiply(odd, x + 1);
    } else {  // one column after the other: there are no registers to spare for two
      multiply_one(weights, x);
      multiply_one(weights + Weights::kColumnBytes, x + 1);
    }
  }
  if (panel.columns % 2 != 0) multiply_one(weights, x);
  TM_UNROLL for (int m = 0; m < kRows; ++m) {
    float (*sums)[kBlockRows] = panel.sums + m * panel.sums_stride;
    TM_UNROLL for (int n = 0; n < kBlocks; ++n) store(sums[n], panel.first_chunk ? acc[m][n] : add(load(sums[n]), acc[m][n]));
  }
}

}  // namespace tokenmill::TM_ISA
