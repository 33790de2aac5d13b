// Linear on formats with one fp16 scale per 32 weights.
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

LinearFamily group_kernels(WeightFormat format) {
  switch (format) {
    case WeightFormat::kQ4_0: return kernels<WeightFormat::kQ4_0>();
    case WeightFormat::kQ4_1: return kernels<WeightFormat::kQ4_1>();
    case WeightFormat::kQ5_0: return kernels<WeightFormat::kQ5_0>();
    case WeightFormat::kQ5_1: return kernels<WeightFormat::kQ5_1>();
    case WeightFormat::kQ8_0: return kernels<WeightFormat::kQ8_0>();
    default: return kernels<WeightFormat::kIq4Nl>();
  }
}

}  // namespace tokenmill::TM_ISA
