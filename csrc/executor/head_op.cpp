#include "executor/head_op.h"

#include <algorithm>
#include <limits>

#include "kernels/head_screen.h"
#include "kernels/sampler_rows.h"

namespace tokenmill {
namespace {

// Four rows took longer than with the whole head: products, not reading, then cost most.
constexpr int32_t kMostRows = 2;
// A screen that leaves more than this share of the head is taken up again after so many steps.
constexpr int64_t kWorthwhileShare = 4;
constexpr int32_t kRest = 8;
constexpr int64_t kTaken = 4;  // blocks of maxima at a time

LinearPart with_weight(LinearPart part, const PackedWeight& weight) {
  part.weight = weight;
  return part;
}

}  // namespace

ScreenedHeadOp::ScreenedHeadOp(const LinearPart& head, const PackedWeight& screen, const float* bounds)
    : part_(head), head_({head}), screen_({with_weight(head, screen)}), bounds_(bounds), norms_(kMostRows) {
  for (int64_t begin = 0; begin < head.weight.n; begin += kMaximaBlock) {
    const int64_t end = std::min<int64_t>(begin + kMaximaBlock, head.weight.n);
    largest_bounds_.push_back(*std::max_element(bounds + begin, bounds + end));
  }
  maxima_.resize(largest_bounds_.size());
}

void ScreenedHeadOp::run(const StepContext& context) const {
  const int32_t rows = context.rows(part_.out);
  if (!context.plan.best_only() || rows == 0 || rows > kMostRows || context.watch != nullptr) return head_.run(context);
  if (resting_ > 0) {
    --resting_;
    ++counts_.plain_steps;
    return head_.run(context);
  }
  for (int32_t row = 0; row < rows; ++row) {
    norms_[static_cast<size_t>(row)] = screen_norm(context.row(part_.x, row), part_.x.width);
    if (!(norms_[static_cast<size_t>(row)] < kMostScreenNorm)) return head_.run(context);
  }
  screen_.run(context);
  const int64_t before = counts_.blocks;
  for (int32_t row = 0; row < rows; ++row) {
    if (!find_best(context, row, norms_[static_cast<size_t>(row)])) return head_.run(context);
  }
  counts_.rows += rows;
  const int64_t all = (part_.weight.n + kBlockRows - 1) / kBlockRows;
  if ((counts_.blocks - before) * kWorthwhileShare > all * rows) resting_ = kRest;
}

bool ScreenedHeadOp::find_best(const StepContext& context, int32_t row, double norm) const {
  float* scores = context.floats(part_.out, row);
  const int64_t n = part_.weight.n;
  const auto parts = static_cast<int64_t>(maxima_.size());
  std::atomic<bool> finite{true};
  context.pool.run([&](int index, int count) {
    const auto [begin, end] = ThreadPool::share(parts, index, count);
    const int64_t first = begin * kMaximaBlock;
    if (begin == end) return;
    if (!sampler_rows().block_maxima(scores + first, std::min(end * kMaximaBlock, n) - first, maxima_.data() + begin)) {
      finite.store(false, std::memory_order_relaxed);
    }
  });
  if (!finite.load(std::memory_order_relaxed)) return false;

  LinearArguments arguments = linear_arguments(context, part_);
  arguments.x += static_cast<size_t>(row) * arguments.x_stride;
  arguments.y = scores;
  arguments.rows = 1;
  const auto compute = [&](int64_t block, int thread) {
    linear_kernels().linear(arguments, static_cast<int32_t>(block), static_cast<int32_t>(block) + 1, context.scratch(thread));
  };
  // The exact logits around the best score: none below the largest of them can win.
  const int64_t top = (std::max_element(maxima_.begin(), maxima_.end()) - maxima_.begin());
  const float* part = scores + top * kMaximaBlock;
  const int64_t first = (std::find(part, part + std::min(kMaximaBlock, n - top * kMaximaBlock), maxima_[static_cast<size_t>(top)]) - scores) / kBlockRows;
  compute(first, 0);
  const float* logits = scores + first * kBlockRows;
  const double least = *std::max_element(logits, logits + std::min<int64_t>(kBlockRows, n - first * kBlockRows));

  // NaN and infinite bounds count as candidates.
  const auto out_of_reach = [&](float score, float bound) { return score + bound * norm + kScreenUnderflow < least; };
  std::atomic<int64_t> next{0}, computed{1};
  context.pool.run([&](int index, int) {
    int64_t mine = 0;
    for (int64_t begin; (begin = next.fetch_add(kTaken, std::memory_order_relaxed)) < parts;) {
      for (int64_t at = begin; at < std::min(begin + kTaken, parts); ++at) {
        if (out_of_reach(maxima_[static_cast<size_t>(at)], largest_bounds_[static_cast<size_t>(at)])) continue;
        const int64_t last = std::min((at + 1) * kMaximaBlock, n);
        for (int64_t id = at * kMaximaBlock; id < last; id += kBlockRows) {
          bool candidate = false;
          for (int64_t i = id; i < std::min<int64_t>(id + kBlockRows, last); ++i) candidate |= !out_of_reach(scores[i], bounds_[i]);
          if (!candidate || id / kBlockRows == first) continue;
          compute(id / kBlockRows, index);
          ++mine;
        }
      }
    }
    computed.fetch_add(mine, std::memory_order_relaxed);
  });
  counts_.blocks += computed.load(std::memory_order_relaxed);
  return true;
}

}  // namespace tokenmill
