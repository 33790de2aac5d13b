// Linears that need no barrier between them, run as one parallel region.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "executor/op.h"

namespace tokenmill {

struct LinearPart {
  Value x;
  PackedWeight weight;
  Value out;
  const float* bias;  // [n] or null
  std::optional<Value> residual;
};

// All rows of a part.
LinearArguments linear_arguments(const StepContext& context, const LinearPart& part);

class LinearGroupOp final : public Op {
 public:
  explicit LinearGroupOp(std::vector<LinearPart> parts) : parts_(std::move(parts)) {}
  void run(const StepContext& context) const override;
  size_t scratch_bytes() const override { return linear_scratch_bytes(); }
  std::vector<Value> results() const override;
  std::vector<ThreadPool::Stretch> first_reads(int threads) const override;

 private:
  int32_t row_blocks() const;
  int32_t chunk_blocks(int threads) const;

  std::vector<LinearPart> parts_;
};

}  // namespace tokenmill
