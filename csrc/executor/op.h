// What the ops of a program share: values in the arena, the context of one step, and loops over rows.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <vector>

#include "executor/kv_cache.h"
#include "executor/step_plan.h"
#include "kernels/linear.h"
#include "platform/thread_pool.h"

namespace tokenmill {

// One value of the program: row r lies at offset + r * row_bytes of the arena.
struct Value {
  size_t offset;
  size_t row_bytes;  // a multiple of 64
  int32_t width;
  ActivationFormat format;
  bool sampled;  // rows are the step's sampled rows, not its tokens
};

// Looks for the first non-finite number among the rows that one row depends on.
struct Watch {
  int32_t token_begin, token_end;
  int32_t sampled_row;  // its place among the sampled rows, or -1
  std::atomic<bool> found{false};

  void see(bool sampled, int32_t row, const float* x, int32_t width);
};

struct StepContext {
  const StepPlan& plan;
  ThreadPool& pool;
  const KvCache& cache;
  uint8_t* arena;
  uint8_t* thread_scratch;
  size_t thread_scratch_bytes;
  float* spare_rows;  // fp32 rows of values that exist only as int8 copies
  Watch* watch = nullptr;

  uint8_t* scratch(int thread) const { return thread_scratch + static_cast<size_t>(thread) * thread_scratch_bytes; }
  uint8_t* row(const Value& value, int32_t row) const {
    return arena + value.offset + static_cast<size_t>(row) * value.row_bytes;
  }
  float* floats(const Value& value, int32_t r) const { return reinterpret_cast<float*>(row(value, r)); }
  int32_t rows(const Value& value) const { return value.sampled ? plan.sampled() : plan.tokens(); }
};

class Op {
 public:
  virtual ~Op() = default;
  virtual void run(const StepContext& context) const = 0;
  // Bytes that run() uses of each thread's scratch.
  virtual size_t scratch_bytes() const { return 0; }
  // Floats that run() uses of the context's spare rows, for `tokens` rows.
  virtual size_t spare_floats([[maybe_unused]] int32_t tokens) const { return 0; }
  // The weights that each of `threads` threads reads first, [threads], or nothing.
  virtual std::vector<ThreadPool::Stretch> first_reads([[maybe_unused]] int threads) const { return {}; }
  // fp32 values that run() assigns.
  virtual std::vector<Value> results() const = 0;
};

// What a row-producing op assigns: the fp32 row, int8 copies, or both.
struct RowOutputs {
  std::optional<Value> out;
  std::vector<Value> copies;

  // Makes the copies of row `row` (quantized from the fp32 value, NUMERICS N2) and shows it to the watch.
  void finish(const StepContext& context, int32_t row, const float* x, int32_t width) const;
  std::vector<Value> results() const { return out ? std::vector<Value>{*out} : std::vector<Value>{}; }
};

// Below this many elements a fork costs more than a second thread saves.
inline constexpr int64_t kSerialElements = 8192;

// Runs body(row, scratch of the thread) for every row, in one parallel region unless rows * cost is small; `cost`
// counts elements of about a nanosecond's quarter each.
template <class Body>
void for_rows(const StepContext& context, int32_t rows, int32_t cost, const Body& body) {
  if (rows < 2 || static_cast<int64_t>(rows) * cost < kSerialElements) {
    for (int32_t row = 0; row < rows; ++row) body(row, context.scratch(0));
    return;
  }
  context.pool.run([&](int index, int count) {
    const auto [begin, end] = ThreadPool::share(rows, index, count);
    for (int64_t row = begin; row < end; ++row) body(static_cast<int32_t>(row), context.scratch(index));
  });
}

}  // namespace tokenmill
