// The Linear kernel table of one instruction-set path.
#include "kernels/linear.h"

#include "kernels/per_isa/linear_families.h"

namespace tokenmill::TM_ISA {
namespace {

LinearFamily kernels_of(WeightFormat format) {
  if (format <= WeightFormat::kBf16) return element_kernels(format);
  if (format <= WeightFormat::kIq4Nl) return group_kernels(format);
  return super_block_kernels(format);
}

void linear(const LinearArguments& arguments, int32_t block_begin, int32_t block_end, uint8_t* scratch) {
  if (arguments.rows <= 0) return;
  kernels_of(arguments.weight.format).linear(arguments, block_begin, block_end, scratch);
}

void decode_row(const PackedWeight& weight, int32_t row, float* out) { kernels_of(weight.format).decode_row(weight, row, out); }

}  // namespace

extern const LinearKernels linear_kernels_table = {quantize_row, linear, decode_row};

}  // namespace tokenmill::TM_ISA
