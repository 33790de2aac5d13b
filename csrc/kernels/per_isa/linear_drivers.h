// The loops around the multiplication of one chunk: few rows read the packed stream directly, many rows share tiles
// that are unpacked into scratch. Both walk the chunks of a row block in order and restart accumulators at the same
// columns, so both give the same bits.
//
// A Format provides kChunkBytes, kRestartColumns, chunk_bytes(columns), activations(arguments, row, column),
// multiply_packed<rows>, unpack and a Kind; a Kind provides Tile, Activations and multiply_tile<rows>.
#pragma once

#include "kernels/per_isa/linear_shapes.h"

namespace tokenmill::TM_ISA {

TM_INLINE void store_outputs(const LinearArguments& arguments, int32_t block, int32_t row, F32x16 y) {
  const int32_t column = block * kBlockRows;
  const int lanes = arguments.weight.n - column < kBlockRows ? arguments.weight.n - column : kBlockRows;
  if (arguments.bias != nullptr) y = add(y, load_first(arguments.bias + column, lanes));
  if (arguments.residual != nullptr) y = add(y, load_first(arguments.residual + row * arguments.residual_stride + column, lanes));
  store_first(arguments.y + row * arguments.y_stride + column, y, lanes);
}

// All lines of a chunk at once, two chunks before they are read: measured 95-98 % of the read bandwidth, against 65-70 %
// without and 80-86 % when spread over the loop. The address may lie past the end; a prefetch does not fault.
template <int kBytes>
TM_INLINE void prefetch_lines(const uint8_t* p, size_t ahead) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(p) + ahead;
#pragma GCC unroll 80
  for (int line = 0; line < kBytes; line += 64) prefetch(reinterpret_cast<const void*>(begin + static_cast<uintptr_t>(line)));
}

// One row block times kRows rows.
template <class Format, int kRows>
__attribute__((noinline)) void multiply_direct(const LinearArguments& arguments, int32_t block, int32_t row) {
  const int32_t k = arguments.weight.k;
  const uint8_t* chunk = arguments.weight.data + static_cast<size_t>(block) * row_block_bytes(arguments.weight.format, k);
  F32x16 total[kRows], acc[kRows][1];
  TM_UNROLL for (int m = 0; m < kRows; ++m) {
    total[m] = zero_f32();
    acc[m][0] = zero_f32();
  }
  for (int32_t column = 0; column < k;) {
    const int columns = k - column < kChunkColumns ? k - column : kChunkColumns;
    prefetch_lines<Format::kChunkBytes>(chunk, 2 * Format::kChunkBytes);
    Format::template multiply_packed<kRows>(chunk, columns, Format::activations(arguments, row, column), acc);
    chunk += Format::chunk_bytes(columns);
    column += columns;
    if (column % Format::kRestartColumns == 0 || column == k) {
      TM_UNROLL for (int m = 0; m < kRows; ++m) {
        total[m] = add(total[m], acc[m][0]);
        acc[m][0] = zero_f32();
      }
    }
  }
  TM_UNROLL for (int m = 0; m < kRows; ++m) store_outputs(arguments, block, row + m, total[m]);
}

// `rows` rows from `row`, the largest kernel first.
template <class Format, int... kSizes>
TM_INLINE void multiply_direct_rows(Indices<kSizes...>, const LinearArguments& arguments, int32_t block, int32_t rows) {
  int32_t row = 0;
  const auto while_they_fit = [&](auto size) TM_UNROLLED {
    for (; rows - row >= size; row += size) multiply_direct<Format, decltype(size)::value>(arguments, block, row);
  };
  (while_they_fit(Index<kSizes>{}), ...);
}

using TileRow = float[kTileBlocks][16];

template <class Format>
struct TileScratch {
  alignas(64) TileRow acc[kSweepRows];
  alignas(64) TileRow total[kSweepRows];
  typename Format::Kind::Tile tile;
};

// kRows rows times the row blocks of a tile, one chunk.
template <class Kind, int kRows>
TM_INLINE void multiply_panel(const typename Kind::Tile& tile, int columns, const typename Kind::Activations& x, TileRow* rows) {
  F32x16 acc[kRows][kTileBlocks];
  TM_UNROLL for (int m = 0; m < kRows; ++m) {
    TM_UNROLL for (int n = 0; n < kTileBlocks; ++n) acc[m][n] = load(rows[m][n]);
  }
  Kind::template multiply_tile<kRows>(tile, columns, x, acc);
  TM_UNROLL for (int m = 0; m < kRows; ++m) {
    TM_UNROLL for (int n = 0; n < kTileBlocks; ++n) store(rows[m][n], acc[m][n]);
  }
}

// A tile times all rows of a sweep. One instance per kind of format, not per format.
template <class Kind>
__attribute__((noinline)) void sweep_tile(const typename Kind::Tile& tile, int columns, typename Kind::Activations x, int rows,
                                          TileRow* acc) {
  int m = 0;
  for (; m + kTileRows <= rows; m += kTileRows) multiply_panel<Kind, kTileRows>(tile, columns, x.from_row(m), acc + m);
  unroll<kTileRows - 1>([&](auto i) TM_UNROLLED {
    constexpr int kRows = kTileRows - 1 - decltype(i)::value;
    if (rows - m == kRows) {
      multiply_panel<Kind, kRows>(tile, columns, x.from_row(m), acc + m);
      m += kRows;
    }
  });
}

// Up to kTileBlocks row blocks times up to kSweepRows rows.
template <class Format>
void multiply_tiles(const LinearArguments& arguments, int32_t block, int blocks, int32_t row, int rows, TileScratch<Format>& scratch) {
  const int32_t k = arguments.weight.k;
  const size_t block_bytes = row_block_bytes(arguments.weight.format, k);
  const uint8_t* chunk = arguments.weight.data + static_cast<size_t>(block) * block_bytes;
  const size_t sweep_bytes = sizeof(TileRow) * static_cast<size_t>(rows);
  memset(scratch.acc, 0, sweep_bytes);
  memset(scratch.total, 0, sweep_bytes);
  for (int32_t column = 0; column < k;) {
    const int columns = k - column < kChunkColumns ? k - column : kChunkColumns;
    for (int n = 0; n < blocks; ++n) {
      const uint8_t* packed = chunk + static_cast<size_t>(n) * block_bytes;
      Format::unpack(packed, columns, scratch.tile, n);
      prefetch_lines<Format::kChunkBytes>(packed, Format::kChunkBytes);
    }
    sweep_tile<typename Format::Kind>(scratch.tile, columns, Format::activations(arguments, row, column), rows, scratch.acc);
    chunk += Format::chunk_bytes(columns);
    column += columns;
    if (column % Format::kRestartColumns == 0 || column == k) {
      for (int m = 0; m < rows; ++m) {
        for (int n = 0; n < kTileBlocks; ++n) store(scratch.total[m][n], add(load(scratch.total[m][n]), load(scratch.acc[m][n])));
      }
      memset(scratch.acc, 0, sweep_bytes);
    }
  }
  for (int m = 0; m < rows; ++m) {
    for (int n = 0; n < blocks; ++n) store_outputs(arguments, block + n, row + m, load(scratch.total[m][n]));
  }
}

template <class Format>
void multiply_blocks(const LinearArguments& arguments, int32_t block_begin, int32_t block_end, uint8_t* scratch) {
  if (arguments.rows <= kDirectRows) {
    for (int32_t block = block_begin; block < block_end; ++block) {
      multiply_direct_rows<Format>(DirectRows{}, arguments, block, arguments.rows);
    }
    return;
  }
  static_assert(sizeof(TileScratch<Format>) <= kLinearScratchBytes);
  TileScratch<Format>& tiles = *reinterpret_cast<TileScratch<Format>*>(scratch);
  memset(static_cast<void*>(&tiles.tile), 0, sizeof(tiles.tile));  // the last tile may lack row blocks; compute with zeros there
  for (int32_t row = 0; row < arguments.rows; row += kSweepRows) {
    const int rows = arguments.rows - row < kSweepRows ? arguments.rows - row : kSweepRows;
    for (int32_t block = block_begin; block < block_end; block += kTileBlocks) {
      const int blocks = block_end - block < kTileBlocks ? block_end - block : kTileBlocks;
      multiply_tiles<Format>(arguments, block, blocks, row, rows, tiles);
    }
  }
}

}  // namespace tokenmill::TM_ISA
