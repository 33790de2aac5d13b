// Linear on F32, F16 and BF16 weights.
#include "kernels/per_isa/linear_elements.h"

#include "kernels/per_isa/linear_drivers.h"
#include "kernels/per_isa/linear_families.h"

namespace tokenmill::TM_ISA {
namespace {

template <WeightFormat kFormat>
constexpr LinearFamily kernels() {
  return {multiply_blocks<ElementFormat<kFormat>>, ElementFormat<kFormat>::decode_row};
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
