// Runs a program, step by step: the ops in order, each one parallel region, over one arena of activations and the
// KV pages. Building it checks shapes; a step allocates nothing and calls nothing but kernels.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <vector>

#include "executor/attention_op.h"
#include "executor/head_op.h"
#include "executor/kv_cache.h"
#include "executor/linear_op.h"
#include "executor/op.h"
#include "executor/pointwise_ops.h"
#include "platform/mapping.h"

namespace tokenmill {

class Executor {
 public:
  using ValueId = int32_t;

  // An operand of add_linear_group.
  struct Part {
    ValueId x;
    PackedWeight weight;
    size_t weight_bytes;
    ValueId out;
    std::span<const float> bias;  // empty = none
    std::optional<ValueId> residual;
  };
  // What an op with int8 copies assigns.
  struct Outputs {
    std::optional<ValueId> out;
    std::vector<ValueId> copies;
  };

  // Throws std::invalid_argument if a limit is not positive.
  Executor(const StepLimits& limits, int32_t vocab_size, std::shared_ptr<ThreadPool> pool);
  ~Executor() { pool_->read_ahead(nullptr); }  // others may use the pool for longer
  Executor(const Executor&) = delete;
  Executor& operator=(const Executor&) = delete;

  // ---- building: everything throws std::invalid_argument for operands that do not fit ------------------------------
  int32_t add_kv_group(const KvGroup& group) { return cache_.add(group); }
  ValueId add_value(const Value& value);

  // Weights are not copied; they must outlive the executor. Ops run in the order of these calls.
  void add_embed(const PackedWeight& weight, size_t weight_bytes, ValueId out, float scale);
  void add_rms_norm(ValueId x, std::span<const float> weight, const Outputs& outputs, float eps, int32_t group_width,
                    float weight_offset);
  void add_linear_group(std::span<const Part> parts);
  // Like a group of this one part; where the plan allows, only rows that may be the largest are computed. `screen`, `bounds`: of
  // make_screen.
  void add_screened_head(const Part& part, const PackedWeight& screen, size_t screen_bytes, std::span<const float> bounds);
  void add_rope(ValueId x, ValueId out, const RopeArguments& arguments, std::vector<double> frequencies, double magnitude);
  void add_attention(ValueId q, ValueId k, ValueId v, const Outputs& outputs, int32_t layer, int32_t group, int32_t heads,
                     double scale, double softcap);
  void add_gated_activation(ValueId gate, ValueId up, const Outputs& outputs, Activation activation);
  void add_add(ValueId a, ValueId b, ValueId out);
  void add_softcap(ValueId x, ValueId out, float cap);
  void add_gather_sampled(ValueId x, ValueId out);
  void add_quantize(ValueId x, ValueId out);

  // Allocates arena and scratch. Nothing can be added afterwards.
  void prepare();

  // ---- running: one caller at a time, others wait ------------------------------------------------------------------
  // Executes ops [first, last) for the plan. Values stay alive between ranges of one plan; a range from op 0 begins
  // anew. Throws std::invalid_argument, before anything is touched, if the plan breaks a limit, the range lies outside
  // of the program, or the live values belong to another plan.
  void run(std::span<const int32_t> plan, int32_t first, int32_t last);
  // Like run() over the whole program, and returns seconds: of preparing the step (rope tables, schedules), then of each
  // op; and what the forks in them took. A road of its own, so that run() reads no clock.
  struct Times {
    std::vector<double> laps;
    ThreadPool::ForkTimes forks;
  };
  Times run_timed(std::span<const int32_t> plan);
  // Runs the whole program again, op by op, and returns the index of the first op that produced a non-finite number
  // on which row `row` of the step depends, or -1. Writes the same keys and values as the step itself.
  int32_t diagnose(std::span<const int32_t> plan, int32_t row);

  // Of the screened head; zeros if there is none.
  ScreenCounts screen_counts() const { return head_ == nullptr ? ScreenCounts{} : head_->counts(); }
  int32_t op_count() const { return static_cast<int32_t>(ops_.size()); }
  int threads() const { return pool_->size(); }
  const StepLimits& limits() const { return limits_; }
  const KvCache& cache() const { return cache_; }
  const Value& value(ValueId id) const;
  uint8_t* memory(ValueId id) const;
  // Activations, per-thread scratch, span records and angle tables.
  size_t scratch_bytes() const;

 private:
  const Value& typed(ValueId id, ActivationFormat format) const;
  const Value& floats(ValueId id) const { return typed(id, ActivationFormat::kF32); }
  LinearPart lowered(const Part& part) const;
  RowOutputs row_outputs(const Value& like, const Outputs& outputs) const;
  void add(std::unique_ptr<Op> op);
  StepContext context(const StepPlan& plan);
  StepPlan read(std::span<const int32_t> plan) const;
  void start(const StepContext& context);
  void run_op(const StepContext& context, int32_t index);

  StepLimits limits_;
  int32_t vocab_size_;
  std::shared_ptr<ThreadPool> pool_;
  KvCache cache_;
  std::vector<Value> values_;
  std::vector<std::unique_ptr<Op>> ops_;
  std::vector<std::unique_ptr<RopeTable>> rope_tables_;
  std::vector<std::unique_ptr<AttentionSchedule>> schedules_;
  bool prepared_ = false;
  const ScreenedHeadOp* head_ = nullptr;  // one of ops_
  std::vector<PageBounds> page_bounds_;
  std::vector<std::vector<ThreadPool::Stretch>> reads_;  // of each op that reads weights, by thread
  std::vector<const ThreadPool::Stretch*> ahead_;        // by op: what is read next after it
  std::vector<int32_t> live_plan_;  // whose values the arena holds
  Mapping arena_, thread_scratch_, spare_rows_;
  size_t thread_scratch_bytes_ = 0;
  std::mutex running_;
};

}  // namespace tokenmill
