// Linear on formats with integer scales under one fp16 scale per 256 weights.
#include "kernels/per_isa/linear_drivers.h"
#include "kernels/per_isa/linear_families.h"
#include "kernels/per_isa/linear_integer.h"

namespace tokenmill::TM_ISA {
namespace {

template <WeightFormat kFormat>
constexpr LinearFamily kernels() {
  return {multiply_blocks<QuantizedFormat<kFormat>>, QuantizedFormat<kFormat>::decode_row};
}

}  // namespace

LinearFamily super_block_kernels(WeightFormat format) {
  switch (format) {
    case WeightFormat::kQ2K: return kernels<WeightFormat::kQ2K>();
    case WeightFormat::kQ3K: return kernels<WeightFormat::kQ3K>();
    case WeightFormat::kQ4K: return kernels<WeightFormat::kQ4K>();
    case WeightFormat::kQ5K: return kernels<WeightFormat::kQ5K>();
    default: return kernels<WeightFormat::kQ6K>();
  }
}

}  // namespace tokenmill::TM_ISA
