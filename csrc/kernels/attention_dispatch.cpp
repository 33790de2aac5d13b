#include "kernels/attention.h"
#include "platform/per_isa.h"

namespace tokenmill {

TM_DEFINE_DISPATCH(AttentionKernels, attention_kernels)

// q, span records, running records, scores, one page of keys and one column of values in fp32.
size_t attention_scratch_bytes(int32_t head_dim) {
  const size_t padded = static_cast<size_t>(head_dim + 15) / 16 * 16;
  const size_t record = static_cast<size_t>(attention_record_floats(head_dim));
  const size_t rows = static_cast<size_t>(attention_block_rows(head_dim));
  return sizeof(float) * (rows * (padded + 2 * record + kScoreStride) + kPageTokens * padded + kColumnTokens * kColumnFloats);
}

}  // namespace tokenmill
