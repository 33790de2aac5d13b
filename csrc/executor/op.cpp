#include "executor/op.h"

#include <cstring>

namespace tokenmill {

void Watch::see(bool sampled, int32_t row, const float* x, int32_t width) {
  if (sampled ? row != sampled_row : row < token_begin || row >= token_end) return;
  for (int32_t i = 0; i < width; ++i) {
    uint32_t bits;
    std::memcpy(&bits, x + i, sizeof(bits));
    if ((bits & 0x7f800000U) == 0x7f800000U) {
      found.store(true, std::memory_order_relaxed);
      return;
    }
  }
}

void RowOutputs::finish(const StepContext& context, int32_t row, const float* x, int32_t width) const {
  for (const Value& copy : copies) linear_kernels().quantize_row(x, width, copy.format, context.row(copy, row));
  if (context.watch != nullptr) {
    const bool sampled = out ? out->sampled : copies.front().sampled;
    context.watch->see(sampled, row, x, width);
  }
}

}  // namespace tokenmill
