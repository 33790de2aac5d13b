// Linear on F32, F16 and BF16 weights.
#include "kernels/per_isa/linear_elements.h"

#include "kernels/per_isa/linear_families.h"

namespace tokenmill::TM_ISA {
namespace {

inline constexpr int kScratchSums = kGroupBlocks * kElementSweepRows;

struct ElementScratch {
  alignas(64) float x[kPackedRows > kPanelRows ? kPackedRows : kPanelRows][kChunkColumns];
  alignas(64) float sums[kScratchSums][kBlockRows];
  alignas(64) float weights[kGroupBlocks][kChunkColumns][kBlockRows];
};
static_assert(sizeof(ElementScratch) <= kLinearScratchBytes);

using PanelKernel = void (*)(const ElementPanel&);

// Rows of the smallest kernel for `rows` rows.
template <int... kSizes>
constexpr int padded_rows(Indices<kSizes...>, int rows) {
  int padded = 0;
  ((kSizes >= rows ? padded = kSizes : 0), ...);  // descending
  return padded;
}

// The kernel for as many rows.
template <class Weights, int kBlocks, int... kSizes>
PanelKernel panel_kernel(Indices<kSizes...>, int rows) {
  PanelKernel kernel = nullptr;
  ((kSizes == rows ? kernel = multiply_panel<Weights, kSizes, kBlocks> : nullptr), ...);
  return kernel;
}

// The kernel on `blocks` converted row blocks.
PanelKernel converted_kernel(int rows, int blocks) {
  PanelKernel kernel = nullptr;
  unroll<kPanelBlocks>([&](auto i) TM_UNROLLED {
    constexpr int kBlocks = decltype(i)::value + 1;
    if (blocks == kBlocks) kernel = panel_kernel<PackedElements<WeightFormat::kF32>, kBlocks>(ConvertedPanels{}, rows);
  });
  return kernel;
}

// use(begin, count) for nearly equal parts of at most `most`.
template <class Use>
TM_INLINE void for_equal_parts(int32_t total, int32_t most, Use use) {
  const int32_t parts = (total + most - 1) / most;
  for (int32_t i = 0; i < parts; ++i) {
    const int32_t begin = total / parts * i + (i < total % parts ? i : total % parts);
    use(begin, total / parts + (i < total % parts ? 1 : 0));
  }
}

TM_INLINE const uint8_t* activations_at(const LinearArguments& arguments, int32_t row, int32_t column) {
  return arguments.x + static_cast<size_t>(row) * arguments.x_stride + static_cast<size_t>(column) * sizeof(float);
}

void copy_activations(const LinearArguments& arguments, int32_t row, int rows, int32_t column, int columns, float (*out)[kChunkColumns]) {
  for (int m = 0; m < rows; ++m) {
    const float* x = reinterpret_cast<const float*>(activations_at(arguments, row + m, column));
    int k = 0;
    for (; k + 16 <= columns; k += 16) store(out[m] + k, load(x + k));
    if (k < columns) store(out[m] + k, load_first(x + k, columns - k));
  }
}

void prefetch_activations(const LinearArguments& arguments, int32_t row, int rows, int32_t column, int columns) {
  for (int m = 0; m < rows; ++m) {
    const uint8_t* x = activations_at(arguments, row + m, column);
    for (int k = 0; k < columns; k += 16) prefetch(x + 4 * k);
  }
}

TM_INLINE void write_outputs(const LinearArguments& arguments, int32_t block, int blocks, int32_t row, int rows, const float (*sums)[kBlockRows]) {
  for (int m = 0; m < rows; ++m) {
    for (int n = 0; n < blocks; ++n) store_outputs(arguments, block + n, row + m, load(sums[m * blocks + n]));
  }
}

// Packed elements times a panel of rows, one row block after the other. Rows that the kernel has too many are zero.
template <WeightFormat kFormat>
void multiply_few_rows(const LinearArguments& arguments, int32_t block, int blocks, int32_t row, int rows, ElementScratch& scratch) {
  using Weights = PackedElements<kFormat>;
  const int32_t k = arguments.weight.k;
  const size_t block_bytes = row_block_bytes(kFormat, k);
  const uint8_t* group = arguments.weight.data + static_cast<size_t>(block) * block_bytes;
  const int padded = padded_rows(PackedPanels{}, rows);
  const PanelKernel kernel = panel_kernel<Weights, 1>(PackedPanels{}, padded);
  memset(static_cast<void*>(scratch.x[rows]), 0, static_cast<size_t>(padded - rows) * sizeof(scratch.x[0]));
  for (int32_t column = 0; column < k; column += kChunkColumns) {
    const int columns = k - column < kChunkColumns ? k - column : kChunkColumns;
    copy_activations(arguments, row, rows, column, columns, scratch.x);
    for (int n = 0; n < blocks; ++n) {
      const uint8_t* weights = group + static_cast<size_t>(n) * block_bytes + Weights::kColumnBytes * static_cast<size_t>(column);
      // After the group's last row block comes the next chunk of its first one, then the next group.
      const uint8_t* next = weights + block_bytes;
      if (n + 1 == blocks && column + columns < k) next = group + Weights::kColumnBytes * static_cast<size_t>(column + columns);
      kernel({scratch.x[0], weights, 0, columns, column == 0, scratch.sums + n, blocks, next, 2 * Weights::kColumnBytes, 0});
    }
  }
  write_outputs(arguments, block, blocks, row, rows, scratch.sums);
}

// Converted elements times many rows.
template <WeightFormat kFormat>
void multiply_many_rows(const LinearArguments& arguments, int32_t block, int blocks, int32_t row, int rows, ElementScratch& scratch) {
  using Weights = PackedElements<kFormat>;
  const int32_t k = arguments.weight.k;
  const size_t block_bytes = row_block_bytes(kFormat, k);
  const uint8_t* group = arguments.weight.data + static_cast<size_t>(block) * block_bytes;
  // So that all panels together reach the end of the next chunk.
  const size_t panels = static_cast<size_t>((rows + kPanelRows - 1) / kPanelRows);
  const size_t ahead_step = (2 * Weights::kColumnBytes + panels - 1) / panels;
  for (int32_t column = 0; column < k; column += kChunkColumns) {
    const int columns = k - column < kChunkColumns ? k - column : kChunkColumns;
    const uint8_t* chunk = group + Weights::kColumnBytes * static_cast<size_t>(column);
    const uint8_t* next = column + columns < k ? chunk + Weights::kChunkBytes : group + static_cast<size_t>(blocks) * block_bytes;
    for (int n = 0; n < blocks; ++n) Weights::convert(chunk + static_cast<size_t>(n) * block_bytes, columns, scratch.weights[n]);
    const uint8_t* ahead = next;
    for_equal_parts(rows, kPanelRows, [&](int32_t first, int32_t count) {
      copy_activations(arguments, row + first, count, column, columns, scratch.x);
      for_equal_parts(blocks, kPanelBlocks, [&](int32_t n, int32_t width) {
        // Of the next panel, this kernel's share.
        const int begin = count * n / blocks, end = count * (n + width) / blocks, following = first + count;
        if (following + end <= rows) prefetch_activations(arguments, row + following + begin, end - begin, column, columns);
        converted_kernel(count, width)({scratch.x[0], reinterpret_cast<const uint8_t*>(scratch.weights[n]), sizeof(scratch.weights[0]), columns,
                                        column == 0, scratch.sums + first * blocks + n, blocks,
                                        ahead + static_cast<size_t>(n) * block_bytes, ahead_step, block_bytes});
      });
      ahead += kChunkColumns / 2 * ahead_step;
    });
  }
  write_outputs(arguments, block, blocks, row, rows, scratch.sums);
}

template <WeightFormat kFormat>
void multiply_blocks(const LinearArguments& arguments, int32_t block_begin, int32_t block_end, uint8_t* scratch) {
  ElementScratch& own = *reinterpret_cast<ElementScratch*>(scratch);
  const bool few = arguments.rows <= kPackedRows;
  for_equal_parts(arguments.rows, few ? kPackedRows : kElementSweepRows, [&](int32_t row, int32_t rows) {
    const int32_t most = few ? kScratchSums / kPackedRows : kGroupBlocks;
    for_equal_parts(block_end - block_begin, most, [&](int32_t block, int32_t blocks) {
      (few ? multiply_few_rows<kFormat> : multiply_many_rows<kFormat>)(arguments, block_begin + block, blocks, row, rows, own);
    });
  });
}

template <WeightFormat kFormat>
void decode_row(const PackedWeight& weight, int32_t row, float* out) {
  using Weights = PackedElements<kFormat>;
  const uint8_t* block = weight.data + static_cast<size_t>(row / kBlockRows) * row_block_bytes(kFormat, weight.k);
  float columns[kChunkColumns][kBlockRows];
  for (int32_t column = 0; column < weight.k; column += kChunkColumns) {
    const int count = weight.k - column < kChunkColumns ? weight.k - column : kChunkColumns;
    Weights::convert(block + Weights::kColumnBytes * static_cast<size_t>(column), count, columns);
    for (int k = 0; k < count; ++k) out[column + k] = columns[k][row % kBlockRows];
  }
}

template <WeightFormat kFormat>
constexpr LinearFamily kernels() {
  return {multiply_blocks<kFormat>, decode_row<kFormat>};
}

}  // namespace

LinearFamily element_kernels(WeightFormat format) {
  switch (format) {
    case WeightFormat::kF16: return kernels<WeightFormat::kF16>();
    case WeightFormat::kBf16: return kernels<WeightFormat::kBf16>();
    default: return kernels<WeightFormat::kF32>();
  }
}

}  // namespace tokenmill::TM_ISA
