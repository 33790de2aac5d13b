// The three families of weight formats; each is compiled in a source of its own.
#pragma once

#include "kernels/linear.h"

namespace tokenmill::TM_ISA {

struct LinearFamily {
  void (*linear)(const LinearArguments& arguments, int32_t block_begin, int32_t block_end, uint8_t* scratch);
  void (*decode_row)(const PackedWeight& weight, int32_t row, float* out);
};

// Each returns the kernels of one format of the family.
LinearFamily element_kernels(WeightFormat format);      // F32, F16, BF16
LinearFamily group_kernels(WeightFormat format);        // groups of 32
LinearFamily super_block_kernels(WeightFormat format);  // super-blocks of 256

void quantize_row(const float* x, int32_t k, ActivationFormat format, uint8_t* out);

}  // namespace tokenmill::TM_ISA
