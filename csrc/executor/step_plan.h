// The plan of one step as laid by src/tokenmill/program/step.py, and its validation.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace tokenmill {

// Bounds of a step; src/tokenmill/program/step.py.
struct StepLimits {
  int32_t tokens;
  int32_t sequences;
  int32_t sampled;
  int32_t context;  // slots of one sequence
};

// What the plan's page tables may name, per KV group.
struct PageBounds {
  int32_t pages;
  int32_t window;  // 0 = all slots stay visible
};

// Views into the plan's buffer, which must outlive it.
class StepPlan {
 public:
  // Checks everything that the kernels rely on. Throws std::invalid_argument naming section, index and bound.
  StepPlan(std::span<const int32_t> words, const StepLimits& limits, int32_t vocab_size,
           std::span<const PageBounds> groups);

  int32_t tokens() const { return tokens_; }
  int32_t sequences() const { return sequences_; }
  int32_t sampled() const { return sampled_; }
  // Whether of each row of logits only the largest and its place are wanted.
  bool best_only() const { return best_only_; }
  const int32_t* token_ids() const { return token_ids_; }
  const int32_t* positions() const { return positions_; }
  const int32_t* slots() const { return slots_; }
  // Rows [row_starts()[s], row_starts()[s + 1]) belong to sequence s.
  const int32_t* row_starts() const { return row_starts_; }
  const int32_t* sampled_rows() const { return sampled_rows_; }
  const int32_t* page_table(int32_t group, int32_t sequence) const {
    return page_tables_ + (static_cast<int64_t>(group) * sequences_ + sequence) * table_stride_;
  }

 private:
  void check_rows(const StepLimits& limits, int32_t vocab_size) const;
  void check_pages(std::span<const PageBounds> groups) const;

  int32_t tokens_, sequences_, sampled_, table_stride_;
  bool best_only_;
  const int32_t *token_ids_, *positions_, *slots_, *row_starts_, *sampled_rows_, *page_tables_;
};

}  // namespace tokenmill
