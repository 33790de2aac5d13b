// The output head where only the largest logit of each row is wanted: a screen first, exact logits for what may win.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#include "executor/linear_op.h"

namespace tokenmill {

// What screens have done, over all steps.
struct ScreenCounts {
  int64_t rows = 0;         // screened
  int64_t blocks = 0;       // row blocks of the head that they needed all the same
  int64_t plain_steps = 0;  // that a screen could have served, but the last ones were hardly worth it
};

// Runs the head's Linear, unless the plan says that only the best of each row counts. Then a row holds the exact logit,
// bit for bit, wherever that might be the row's largest, and something smaller than the largest everywhere else.
class ScreenedHeadOp final : public Op {
 public:
  // bounds: [n], of make_screen.
  ScreenedHeadOp(const LinearPart& head, const PackedWeight& screen, const float* bounds);
  void run(const StepContext& context) const override;
  size_t scratch_bytes() const override { return linear_scratch_bytes(); }
  std::vector<Value> results() const override { return head_.results(); }
  std::vector<ThreadPool::Stretch> first_reads(int threads) const override { return screen_.first_reads(threads); }
  const ScreenCounts& counts() const { return counts_; }

 private:
  // False if the row needs the whole head.
  bool find_best(const StepContext& context, int32_t row, double norm) const;

  LinearPart part_;
  LinearGroupOp head_, screen_;
  const float* bounds_;
  std::vector<float> largest_bounds_;    // of kMaximaBlock rows each
  mutable std::vector<float> maxima_;    // of kMaximaBlock scores each
  mutable std::vector<double> norms_;    // of the step's rows
  mutable int32_t resting_ = 0;          // steps to come that take the whole head
  mutable ScreenCounts counts_;
};

}  // namespace tokenmill
