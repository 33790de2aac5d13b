#include "executor/step_plan.h"

#include <stdexcept>
#include <string>

#include "kernels/attention.h"

namespace tokenmill {
namespace {

constexpr int32_t kVersion = 1;
constexpr int64_t kHeaderWords = 8;

[[noreturn]] void refuse(const std::string& what) { throw std::invalid_argument("step plan: " + what); }

void check_count(const char* name, int32_t count, int32_t least, int32_t most) {
  if (count < least || count > most) {
    refuse(std::string(name) + " is " + std::to_string(count) + ", must be in " + std::to_string(least) + ".." +
           std::to_string(most));
  }
}

std::string at(const char* section, int64_t index, int32_t value) {
  return std::string(section) + "[" + std::to_string(index) + "] is " + std::to_string(value);
}

}  // namespace

StepPlan::StepPlan(std::span<const int32_t> words, const StepLimits& limits, int32_t vocab_size,
                   std::span<const PageBounds> groups) {
  if (static_cast<int64_t>(words.size()) < kHeaderWords) refuse("shorter than its header of 8 words");
  if (words[0] != kVersion) refuse("version " + std::to_string(words[0]) + ", this executor reads version 1");
  tokens_ = words[1];
  sequences_ = words[2];
  sampled_ = words[3];
  table_stride_ = words[5];
  check_count("best only", words[6], 0, 1);
  best_only_ = words[6] == 1;
  check_count("tokens", tokens_, 1, limits.tokens);
  check_count("sequences", sequences_, 1, limits.sequences);
  check_count("sampled", sampled_, 0, limits.sampled);
  check_count("groups", words[4], static_cast<int32_t>(groups.size()), static_cast<int32_t>(groups.size()));
  if (table_stride_ < 0) refuse("table stride is negative");
  const int64_t tables = static_cast<int64_t>(groups.size()) * sequences_ * table_stride_;
  const int64_t expected = kHeaderWords + int64_t{3} * tokens_ + sequences_ + 1 + sampled_ + tables;
  if (static_cast<int64_t>(words.size()) != expected) {
    refuse("has " + std::to_string(words.size()) + " words, its header announces " + std::to_string(expected));
  }
  token_ids_ = words.data() + kHeaderWords;
  positions_ = token_ids_ + tokens_;
  slots_ = positions_ + tokens_;
  row_starts_ = slots_ + tokens_;
  sampled_rows_ = row_starts_ + sequences_ + 1;
  page_tables_ = sampled_rows_ + sampled_;
  check_rows(limits, vocab_size);
  check_pages(groups);
}

void StepPlan::check_rows(const StepLimits& limits, int32_t vocab_size) const {
  for (int32_t row = 0; row < tokens_; ++row) {
    if (token_ids_[row] < 0 || token_ids_[row] >= vocab_size) {
      refuse(at("token_ids", row, token_ids_[row]) + ", the vocabulary has " + std::to_string(vocab_size) + " entries");
    }
    if (positions_[row] < 0) refuse(at("positions", row, positions_[row]) + ", must not be negative");
    if (slots_[row] < 0 || slots_[row] >= limits.context) {
      refuse(at("slots", row, slots_[row]) + ", a sequence has " + std::to_string(limits.context) + " slots");
    }
  }
  if (row_starts_[0] != 0) refuse(at("row_starts", 0, row_starts_[0]) + ", must be 0");
  for (int32_t s = 0; s < sequences_; ++s) {
    const int32_t begin = row_starts_[s], end = row_starts_[s + 1];
    if (end <= begin || end > tokens_) refuse(at("row_starts", s + 1, end) + ", must ascend and end at tokens");
    for (int32_t row = begin + 1; row < end; ++row) {
      if (slots_[row] != slots_[row - 1] + 1) refuse(at("slots", row, slots_[row]) + ", slots of a sequence are consecutive");
    }
  }
  if (row_starts_[sequences_] != tokens_) refuse(at("row_starts", sequences_, row_starts_[sequences_]) + ", must be tokens");
  for (int32_t i = 0; i < sampled_; ++i) {
    const int32_t least = i == 0 ? 0 : sampled_rows_[i - 1] + 1;
    if (sampled_rows_[i] < least || sampled_rows_[i] >= tokens_) {
      refuse(at("sampled_rows", i, sampled_rows_[i]) + ", must ascend within the step's rows");
    }
  }
}

void StepPlan::check_pages(std::span<const PageBounds> groups) const {
  for (int32_t group = 0; group < static_cast<int32_t>(groups.size()); ++group) {
    const PageBounds& bounds = groups[static_cast<size_t>(group)];
    for (int32_t s = 0; s < sequences_; ++s) {
      const int32_t* pages = page_table(group, s);
      const int32_t last = slots_[row_starts_[s + 1] - 1] / kPageTokens;
      if (last >= table_stride_) {
        refuse("page tables hold " + std::to_string(table_stride_) + " pages, sequence " + std::to_string(s) + " needs " +
               std::to_string(last + 1));
      }
      for (int32_t i = first_visible_slot(slots_[row_starts_[s]], bounds.window) / kPageTokens; i <= last; ++i) {
        if (pages[i] < 0 || pages[i] >= bounds.pages) {
          refuse("page " + std::to_string(i) + " of sequence " + std::to_string(s) + " in KV group " + std::to_string(group) +
                 " is " + std::to_string(pages[i]) + ", the group has pages 0.." + std::to_string(bounds.pages - 1));
        }
      }
    }
  }
}

}  // namespace tokenmill
