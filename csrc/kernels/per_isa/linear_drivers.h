// The loops around the multiplication of one chunk: few rows read the packed stream directly, many rows share tiles
// that are unpacked into scratch. Both walk the chunks of a row block in order and restart accumulators at the same
// columns, so both give the same bits.
//
// A Format provides kChunkBytes, kRestartColumns, chunk_bytes(columns), activations(arguments, row, column),
// multiply_packed<rows>, unpack and a Kind; a Kind provides Tile, Activations and multiply_tile<rows>.
#pragma once

#include "kernels/per_isa/linear_shapes.h"
#include "platform/isa.h"

namespace tokenmill::TM_ISA {

TM_INLINE void store_outputs(const LinearArguments& arguments, int32_t block, int32_t row, F32x16 y) {
  const int32_t column = block * kBlockRows;
  const int lanes = arguments.weight.n - column < kBlockRows ? arguments.weight.n - column : kBlockRows;
  if (arguments.bias != nullptr) y = add(y, load_first(arguments.bias + column, lanes));
  if (arguments.residual != nullptr) y = add(y, load_first(arguments.residual + row * arguments.residual_stride + column, lanes));
  store_first(arguments.y + row * arguments.y_stride + column, y, lanes);
}

// One row block times kRows rows. The packed stream is prefetched two chunks ahead, all lines of a chunk in one burst or
// a share with every group of columns, whichever this processor likes better (platform/isa.h).
template <class Format, int kRows>
__attribute__((noinline)) void multiply_direct(const LinearArguments& arguments, int32_t block, int32_t row, bool bursts) {
  const int32_t k = arguments.weight.k;
  const uint8_t* chunk = arguments.weight.data + static_cast<size_t>(block) * row_block_bytes(arguments.weight.format, k);
  F32x16 total[kRows], acc[kRows][1];
  TM_UNROLL for (int m = 0; m < kRows; ++m) {
    total[m] = zero_f32();
    acc[m][0] = zero_f32();
  }
  for (int32_t column = 0; column < k;) {
    const int columns = k - column < kChunkColumns ? k - column : kChunkColumns;
    if (bursts) prefetch_lines<Format::kChunkBytes>(chunk, 2 * Format::kChunkBytes);
    Format::template multiply_packed<kRows>(chunk, columns, Format::activations(arguments, row, column), !bursts, acc);
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
TM_INLINE void multiply_direct_rows(Indices<kSizes...>, const LinearArguments& arguments, int32_t block, int32_t rows, bool bursts) {
  int32_t row = 0;
  const auto while_they_fit = [&](auto size) TM_UNROLLED {
    for (; rows - row >= size; row += size) multiply_direct<Format, decltype(size)::value>(arguments, block, row, bursts);
  };
  (while_they_fit(Index<kSizes>{}), ...);
}

using TileRow = float[kTileBlocks][16];
alignas(64) inline constexpr TileRow kNoSums[kTileRows] = {};

template <class Format>
struct TileScratch {
  alignas(64) TileRow acc[kSweepRows];
  alignas(64) TileRow total[kSweepRows];
  typename Format::Kind::Tile tile;
};

// The columns of a tile times up to kSweepRows rows and kTileBlocks row blocks: where it stands on its way along K.
struct Sweep {
  const LinearArguments& arguments;
  int32_t block, row;  // the first of each
  int blocks, rows;
  TileRow* acc;    // of the segment's chunks so far
  TileRow* total;  // of the segments so far
  bool begins_segment, ends_segment, first_segment, last_segment;
  // The packed chunk of each row block that comes after this one is prefetched along the way, `next_lines` of each with
  // every register tile: all at once they would fill the line buffers and hold up the loads that are needed now.
  const uint8_t* next;
  size_t next_stride;
  int next_lines;
};

__attribute__((noinline)) inline void write_outputs(const Sweep& sweep, int m, int rows) {
  for (int i = m; i < m + rows; ++i) {
    for (int n = 0; n < sweep.blocks; ++n) store_outputs(sweep.arguments, sweep.block + n, sweep.row + i, load(sweep.acc[i][n]));
  }
}

// kRows rows times the row blocks of a tile, one chunk.
template <class Kind, int kRows>
TM_INLINE void multiply_panel(const typename Kind::Tile& tile, int columns, const typename Kind::Activations& x, const Sweep& sweep, int row) {
  TileRow* rows = sweep.acc + row;
  const TileRow* sums = sweep.begins_segment ? kNoSums : rows;
  F32x16 acc[kRows][kTileBlocks];
  const auto before = [&](int m, int n) TM_UNROLLED { return load(sums[m][n]); };
  Kind::template multiply_tile<kRows>(tile, columns, x, before, acc);
  if (sweep.ends_segment) {
    TileRow* total = sweep.total + row;
    TM_UNROLL for (int m = 0; m < kRows; ++m) {
      TM_UNROLL for (int n = 0; n < kTileBlocks; ++n) {
        acc[m][n] = add(sweep.first_segment ? zero_f32() : load(total[m][n]), acc[m][n]);
      }
    }
    if (!sweep.last_segment) rows = total;
  }
  TM_UNROLL for (int m = 0; m < kRows; ++m) {
    TM_UNROLL for (int n = 0; n < kTileBlocks; ++n) store(rows[m][n], acc[m][n]);
  }
  if (sweep.ends_segment && sweep.last_segment) write_outputs(sweep, row, kRows);
}

// A tile times all rows of a sweep. One instance per kind of format, not per format.
template <class Kind>
__attribute__((noinline)) void sweep_tile(const typename Kind::Tile& tile, int columns, typename Kind::Activations x, Sweep& sweep) {
  int m = 0;
  for (; m + kTileRows <= sweep.rows; m += kTileRows) {
    for (int n = 0; n < sweep.blocks; ++n) {
      for (int line = 0; line < sweep.next_lines; ++line) prefetch(sweep.next + static_cast<size_t>(n) * sweep.next_stride + 64 * line);
    }
    sweep.next += 64 * sweep.next_lines;
    multiply_panel<Kind, kTileRows>(tile, columns, x.from_row(m), sweep, m);
  }
  unroll<kTileRows - 1>([&](auto i) TM_UNROLLED {
    constexpr int kRows = kTileRows - 1 - decltype(i)::value;
    if (sweep.rows - m == kRows) {
      multiply_panel<Kind, kRows>(tile, columns, x.from_row(m), sweep, m);
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
  const int panels = (rows + kTileRows - 1) / kTileRows;
  Sweep sweep{arguments, block, row, blocks, rows, scratch.acc, scratch.total, true, false, true, false, nullptr, block_bytes, 0};
  for (int32_t column = 0; column < k;) {
    const int columns = k - column < kChunkColumns ? k - column : kChunkColumns;
    for (int n = 0; n < blocks; ++n) Format::unpack(chunk + static_cast<size_t>(n) * block_bytes, columns, scratch.tile, n);
    const auto x = Format::activations(arguments, row, column);
    chunk += Format::chunk_bytes(columns);
    column += columns;
    sweep.ends_segment = column % Format::kRestartColumns == 0 || column == k;
    sweep.last_segment = column == k;
    // After the last chunk come the first ones of the next row blocks.
    sweep.next = column < k ? chunk : chunk + static_cast<size_t>(blocks - 1) * block_bytes;
    sweep.next_lines = (Format::kChunkBytes / 64 + panels - 1) / panels;
    sweep_tile<typename Format::Kind>(scratch.tile, columns, x, sweep);
    sweep.begins_segment = sweep.ends_segment;
    if (sweep.ends_segment) sweep.first_segment = false;
  }
}

template <class Format>
void multiply_blocks(const LinearArguments& arguments, int32_t block_begin, int32_t block_end, uint8_t* scratch) {
  if (arguments.rows <= kDirectRows) {
    const bool bursts = prefers_burst_prefetch();
    for (int32_t block = block_begin; block < block_end; ++block) {
      multiply_direct_rows<Format>(DirectRows{}, arguments, block, arguments.rows, bursts);
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
