#include "kernels/attention.h"
#include "platform/per_isa.h"

namespace tokenmill {

TM_DEFINE_DISPATCH(AttentionKernels, attention_kernels)

// q, scores, span records, running records, one page of keys and of values in fp32.
size_t attention_scratch_bytes(int32_t head_dim) {
  const size_t padded = static_cast<size_t>(head_dim + 15) / 16 * 16;
  const size_t record = static_cast<size_t>(attention_record_floats(head_dim));
  return sizeof(float) * (kQueryRows * (padded + kSpanTokens + 2 * record) + 2 * kPageTokens * padded);
}

}  // namespace tokenmill
