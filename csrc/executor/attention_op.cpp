#include "executor/attention_op.h"

#include <algorithm>

namespace tokenmill {
namespace {

// Items a thread should find when work is split by spans.
constexpr int64_t kItemsPerThread = 4;
// Multiply-adds below which a fork costs more than it saves: about 2 us.
constexpr int64_t kSerialWork = 1 << 15;
// Rows of a register tile.
constexpr int32_t kRowUnit = 8;

int32_t spans_of(int32_t slots) { return (slots + kSpanTokens - 1) / kSpanTokens; }

}  // namespace

AttentionSchedule::AttentionSchedule(const Geometry& geometry, const StepLimits& limits, int threads)
    : geometry_(geometry), threads_(threads) {
  const int64_t group = geometry.heads / geometry.kv_heads;
  const size_t most_blocks =
      static_cast<size_t>(geometry.kv_heads * (limits.tokens * group / kQueryRows + limits.sequences + 1));
  const size_t most_cuts = static_cast<size_t>(threads) * static_cast<size_t>(threads);
  blocks_.reserve(most_blocks + most_cuts);
  items_.reserve(most_blocks + most_cuts + static_cast<size_t>(2 * kItemsPerThread * threads));
  if (threads > 1) {
    // Enough to split one row each of as many long sequences as it takes to keep the threads busy.
    const int64_t sequences = std::min<int64_t>(limits.sequences, threads);
    const int64_t records = sequences * geometry.heads * spans_of(limits.context);
    records_ = Mapping(static_cast<size_t>(records * attention_record_floats(geometry.head_dim)) * sizeof(float));
  }
}

void AttentionSchedule::build(const StepPlan& plan) {
  blocks_.clear();
  items_.clear();
  split_ = false;
  const int32_t group = geometry_.heads / geometry_.kv_heads;
  int64_t spans = 0, work = 0;
  for (int32_t s = 0; s < plan.sequences(); ++s) {
    const int32_t first_slot = plan.slots()[plan.row_starts()[s]];
    const int32_t rows = (plan.row_starts()[s + 1] - plan.row_starts()[s]) * group;
    const int32_t count = (rows + kQueryRows - 1) / kQueryRows;
    // Late rows see the most slots, so they start first.
    for (int32_t b = count - 1; b >= 0; --b) {
      const int32_t row_begin = b * kQueryRows, row_end = std::min(rows, row_begin + kQueryRows);
      const int32_t first = first_visible_slot(first_slot + row_begin / group, geometry_.window);
      const int32_t last = first_slot + (row_end - 1) / group;
      for (int32_t head = 0; head < geometry_.kv_heads; ++head) {
        blocks_.push_back({s, head, row_begin, row_end, first / kSpanTokens, last / kSpanTokens + 1, -1});
        spans += last / kSpanTokens + 1 - first / kSpanTokens;
        work += static_cast<int64_t>(row_end - row_begin) * (last + 1 - first) * 2 * geometry_.head_dim;
      }
    }
  }
  serial_ = threads_ == 1 || work < kSerialWork;
  const int64_t wanted = kItemsPerThread * threads_;
  const bool too_few = !serial_ && static_cast<int64_t>(blocks_.size()) < wanted;
  const int32_t chunk = too_few ? static_cast<int32_t>((spans + wanted - 1) / wanted) : 0;
  const int64_t capacity = static_cast<int64_t>(records_.bytes() / sizeof(float));
  int64_t used = 0;
  whole_.clear();
  for (size_t i = 0; i < blocks_.size(); ++i) {
    Block& block = blocks_[i];
    const int32_t count = block.span_end - block.span_begin;
    const int64_t floats = static_cast<int64_t>(count) * (block.row_end - block.row_begin) *
                           attention_record_floats(geometry_.head_dim);
    if (!too_few || count <= chunk || used + floats > capacity) {
      if (too_few && count > chunk) whole_.push_back(static_cast<int32_t>(items_.size()));
      items_.push_back({static_cast<int32_t>(i), block.span_begin, block.span_end});
      continue;
    }
    split_ = true;
    block.records = used;
    used += floats;
    for (int32_t span = block.span_begin; span < block.span_end; span += chunk) {
      items_.push_back({static_cast<int32_t>(i), span, std::min(span + chunk, block.span_end)});
    }
  }
  if (too_few) share_out_rest();
}

// Long blocks that cannot be split by spans, and are no multiple of the threads: the last ones are cut by rows, so that
// every thread gets as much. Cutting all of them would make the threads convert the same keys and values again.
void AttentionSchedule::share_out_rest() {
  const size_t rest = whole_.size() % static_cast<size_t>(threads_);
  for (size_t i = whole_.size() - rest; i < whole_.size(); ++i) {
    const size_t index = static_cast<size_t>(items_[static_cast<size_t>(whole_[i])].block);
    const Block whole = blocks_[index];
    const int32_t wanted = (whole.row_end - whole.row_begin + threads_ - 1) / threads_;
    const int32_t part = (wanted + kRowUnit - 1) / kRowUnit * kRowUnit;
    blocks_[index].row_end = std::min(whole.row_begin + part, whole.row_end);
    for (int32_t row = whole.row_begin + part; row < whole.row_end; row += part) {
      Block cut = whole;
      cut.row_begin = row;
      cut.row_end = std::min(row + part, whole.row_end);
      items_.push_back({static_cast<int32_t>(blocks_.size()), cut.span_begin, cut.span_end});
      blocks_.push_back(cut);
    }
  }
}

AttentionOp::AttentionOp(Value q, Value k, Value v, RowOutputs outputs, KvLayer cache, double scale, double softcap,
                         const AttentionSchedule* schedule)
    : q_(q), k_(k), v_(v), outputs_(std::move(outputs)), arguments_{}, schedule_(schedule) {
  constexpr double kLog2e = 1.4426950408889634074;
  const AttentionSchedule::Geometry& geometry = schedule->geometry();
  arguments_.cache = cache;
  arguments_.head_dim = geometry.head_dim;
  arguments_.group = geometry.heads / geometry.kv_heads;
  arguments_.window = geometry.window;
  arguments_.q_scale = static_cast<float>(softcap > 0 ? scale : scale * kLog2e);
  arguments_.softcap = static_cast<float>(softcap);
  arguments_.q_stride = static_cast<int64_t>(q.row_bytes / sizeof(float));
  arguments_.out_stride = static_cast<int64_t>((outputs_.out ? outputs_.out->row_bytes : q.row_bytes) / sizeof(float));
}

void AttentionOp::run(const StepContext& context) const {
  float* out = outputs_.out ? context.floats(*outputs_.out, 0) : context.spare_rows;
  write_cache(context);
  attend(context, out);
  if (schedule_->split()) merge(context, out);
  if (outputs_.copies.empty()) return;
  for_rows(context, context.plan.tokens(), q_.width, [&](int32_t row, uint8_t*) {
    outputs_.finish(context, row, out + row * arguments_.out_stride, q_.width);
  });
}

void AttentionOp::write_cache(const StepContext& context) const {
  const AttentionSchedule::Geometry& geometry = schedule_->geometry();
  const StepPlan& plan = context.plan;
  const int32_t* starts = plan.row_starts();
  // Scattered stores of two bytes: about four times the cost of a contiguous pass.
  for_rows(context, plan.tokens(), 8 * k_.width, [&](int32_t row, uint8_t*) {
    const int32_t sequence = static_cast<int32_t>(std::upper_bound(starts, starts + plan.sequences() + 1, row) - starts) - 1;
    const int32_t slot = plan.slots()[row];
    const int32_t page = plan.page_table(geometry.group, sequence)[slot / kPageTokens];
    for (int32_t head = 0; head < geometry.kv_heads; ++head) {
      attention_kernels().write(arguments_.cache, geometry.head_dim, head, page, slot,
                                context.floats(k_, row) + head * geometry.head_dim,
                                context.floats(v_, row) + head * geometry.head_dim);
    }
  });
}

AttentionBlock AttentionOp::block_of(const StepContext& context, const AttentionSchedule::Block& block, float* out) const {
  const int32_t row = context.plan.row_starts()[block.sequence];
  const int32_t column = block.kv_head * arguments_.group * arguments_.head_dim;
  return {context.plan.page_table(schedule_->geometry().group, block.sequence),
          context.floats(q_, row) + column,
          out + row * arguments_.out_stride + column,
          block.kv_head,
          context.plan.slots()[row],
          block.row_begin,
          block.row_end};
}

void AttentionOp::attend(const StepContext& context, float* out) const {
  const AttentionKernels& kernels = attention_kernels();
  const std::vector<AttentionSchedule::Item>& items = schedule_->items();
  const int64_t record = attention_record_floats(arguments_.head_dim);
  std::atomic<size_t> next{0};
  const auto work = [&](int index, int) {
    for (size_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < items.size();) {
      const AttentionSchedule::Item& item = items[i];
      const AttentionSchedule::Block& block = schedule_->blocks()[static_cast<size_t>(item.block)];
      float* records = nullptr;
      if (block.records >= 0) {
        const int64_t skipped = static_cast<int64_t>(item.span_begin - block.span_begin) * (block.row_end - block.row_begin);
        records = schedule_->records() + block.records + skipped * record;
      }
      kernels.attend(arguments_, block_of(context, block, out), item.span_begin, item.span_end, records, context.scratch(index));
    }
  };
  if (schedule_->serial()) {
    work(0, 1);
  } else {
    context.pool.run(work);
  }
}

void AttentionOp::merge(const StepContext& context, float* out) const {
  const AttentionKernels& kernels = attention_kernels();
  const int64_t record = attention_record_floats(arguments_.head_dim);
  const int32_t group = arguments_.group;
  context.pool.run([&](int index, int count) {
    for (const AttentionSchedule::Block& block : schedule_->blocks()) {
      if (block.records < 0) continue;
      const AttentionBlock rows = block_of(context, block, out);
      const int64_t stride = (block.row_end - block.row_begin) * record;
      const auto [begin, end] = ThreadPool::share(block.row_end - block.row_begin, index, count);
      for (int64_t r = begin; r < end; ++r) {
        const int32_t row = block.row_begin + static_cast<int32_t>(r);
        const int32_t slot = rows.first_slot + row / group;
        const int32_t first = first_visible_slot(slot, arguments_.window) / kSpanTokens;
        kernels.merge(schedule_->records() + block.records + (first - block.span_begin) * stride + r * record, stride,
                      slot / kSpanTokens + 1 - first, arguments_.head_dim,
                      rows.out + row / group * arguments_.out_stride + row % group * arguments_.head_dim,
                      context.scratch(index));
      }
    }
  });
}

}  // namespace tokenmill
