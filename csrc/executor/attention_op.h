// Attention over paged keys and values: writes the step's keys and values, then attends.
#pragma once

#include <cstdint>
#include <vector>

#include "executor/op.h"
#include "kernels/attention.h"
#include "platform/mapping.h"

namespace tokenmill {

// How the rows of one step spread over threads: row blocks, and where those are too few, ranges of their spans. Only
// depends on heads, head size, KV group and window, so that all layers alike share one schedule, built once a step.
class AttentionSchedule {
 public:
  struct Geometry {
    int32_t group;  // KV group
    int32_t heads, kv_heads, head_dim, window;
    bool operator==(const Geometry&) const = default;
  };
  struct Block {
    int32_t sequence, kv_head;
    int32_t row_begin, row_end;
    int32_t slot_begin, slot_end;  // that any row sees
    int32_t span_begin, span_end;
    int64_t records;  // first float of its span records, or -1: one item attends to all spans
  };
  struct Item {
    int32_t block;
    int32_t span_begin, span_end;
    int64_t work;  // rows times slots
  };

  AttentionSchedule(const Geometry& geometry, const StepLimits& limits, int threads);

  void build(const StepPlan& plan);

  const Geometry& geometry() const { return geometry_; }
  const std::vector<Block>& blocks() const { return blocks_; }
  const std::vector<Item>& items() const { return items_; }
  float* records() const { return reinterpret_cast<float*>(records_.data()); }
  bool split() const { return split_; }
  // Too little work for a second thread.
  bool serial() const { return serial_; }
  size_t bytes() const { return records_.bytes(); }

 private:
  void add_item(size_t block, int32_t span_begin, int32_t span_end);
  void share_out_rest();

  Geometry geometry_;
  int threads_;
  std::vector<Block> blocks_;
  std::vector<Item> items_;
  std::vector<int32_t> whole_;  // items that are long blocks, of steps with few blocks
  Mapping records_;
  bool split_ = false, serial_ = false;
};

class AttentionOp final : public Op {
 public:
  AttentionOp(Value q, Value k, Value v, RowOutputs outputs, KvLayer cache, double scale, double softcap,
              const AttentionSchedule* schedule);
  void run(const StepContext& context) const override;
  size_t scratch_bytes() const override { return attention_scratch_bytes(schedule_->geometry().head_dim); }
  size_t spare_floats(int32_t tokens) const override {
    return outputs_.out ? 0 : q_.row_bytes / sizeof(float) * static_cast<size_t>(tokens);
  }
  std::vector<Value> results() const override { return outputs_.results(); }

 private:
  void write_cache(const StepContext& context) const;
  void attend(const StepContext& context, float* out) const;
  void merge(const StepContext& context, float* out) const;
  AttentionBlock block_of(const StepContext& context, const AttentionSchedule::Block& block, float* out) const;
  AttentionUpcoming start_of(const StepContext& context, const AttentionSchedule::Item& item) const;

  Value q_, k_, v_;
  RowOutputs outputs_;
  AttentionArguments arguments_;
  const AttentionSchedule* schedule_;
};

}  // namespace tokenmill
