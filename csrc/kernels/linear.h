// y[m, n] = sum over k of x[m, k] * w[n, k] (+ bias[n]) (+ residual[m, n]), on packed weights.
//
// Weights are packed in row blocks of 16 output rows (the last one padded with zero rows); each is one contiguous
// stream that holds exactly the information of the file, so packing can be undone. Work is split by row block: an
// output is computed whole by one thread, whatever the number of threads or rows (NUMERICS N3, N4).
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels/weight_format.h"

namespace tokenmill {

struct PackedWeight {
  WeightFormat format;
  int32_t n;  // output rows
  int32_t k;  // input columns; a multiple of 32 (groups of 32), 256 (super-blocks), 1 (16- and 32-bit formats)
  const uint8_t* data;  // [ceil(n / 16)][row_block_bytes], 64-byte aligned
};

// The activation that `format` multiplies. Throws std::invalid_argument if `format` is not a known number.
ActivationFormat activation_format(WeightFormat format);

// Bytes of one packed block of 16 rows. Throws std::invalid_argument if k does not fit the format.
size_t row_block_bytes(WeightFormat format, int32_t k);
size_t packed_bytes(WeightFormat format, int32_t n, int32_t k);
// Bytes of one row in the checkpoint's own layout.
size_t source_row_bytes(WeightFormat format, int32_t k);

// Repacks rows of the checkpoint (GGUF block layout, or plain little-endian elements) into row blocks
// [block_begin, block_end) of `packed`, which points to block 0. Exact.
void pack_rows(WeightFormat format, const uint8_t* source, int32_t n, int32_t k, uint8_t* packed, int32_t block_begin,
               int32_t block_end);

// Bytes of one activation row of k values in `format`; a multiple of 64. kF32 rows are plain floats.
// int8 rows hold codes, fp32 scales and int32 sums of codes per 16; the arrangement is the kernels' business.
size_t activation_row_bytes(ActivationFormat format, int32_t k);

struct LinearArguments {
  PackedWeight weight;
  const uint8_t* x;  // rows in activation_format(weight.format), 64-byte aligned
  size_t x_stride;   // bytes between rows
  int32_t rows;
  const float* bias;      // [n] or null
  const float* residual;  // [rows, n] added last, or null; may be y itself
  int64_t residual_stride;  // floats
  float* y;
  int64_t y_stride;  // floats
};

struct LinearKernels {
  // x: k floats -> one activation row (NUMERICS N2).
  void (*quantize_row)(const float* x, int32_t k, ActivationFormat format, uint8_t* out);
  // Computes row blocks [block_begin, block_end). `scratch`: linear_scratch_bytes() bytes of this thread's own, 64-byte aligned.
  void (*linear)(const LinearArguments& arguments, int32_t block_begin, int32_t block_end, uint8_t* scratch);
  // Row `row` of the matrix as k floats, equal to the file format's reference decoding (embedding lookup).
  void (*decode_row)(const PackedWeight& weight, int32_t row, float* out);
};

inline constexpr size_t kLinearScratchBytes = 256 * 1024;
inline size_t linear_scratch_bytes() { return kLinearScratchBytes; }

const LinearKernels& linear_kernels();  // of the path in use

}  // namespace tokenmill
