#include "executor/attention_op.h"

#include <algorithm>

namespace tokenmill {
namespace {

// Items a thread should find when work is split by spans.
constexpr int64_t kItemsPerThread = 4;
// Multiply-adds below which a fork costs more than it saves: about 2 us.
constexpr int64_t kSerialWork = 1 << 15;
// Rows of a register tile.
constexpr int32_t kRowUnit = 12;
// Blocks of more rows only while every thread finds so many of them.
constexpr int64_t kBlocksPerThread = 2;

int32_t spans_of(int32_t slots) { return (slots + kSpanTokens - 1) / kSpanTokens; }

}  // namespace

AttentionSchedule::AttentionSchedule(const Geometry& geometry, const StepLimits& limits, int threads)
    : geometry_(geometry), threads_(threads) {
  const int64_t group = geometry.heads / geometry.kv_heads;
  const size_t most_blocks =
      static_cast<size_t>(geometry.kv_heads * (limits.tokens * group / kWideQueryRows + limits.sequences + 1));
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
  const int64_t shared_rows = int64_t{plan.tokens()} * geometry_.heads / (kBlocksPerThread * threads_);
  const int32_t most_rows = static_cast<int32_t>(
      std::clamp<int64_t>(shared_rows / kRowUnit * kRowUnit, kWideQueryRows, attention_block_rows(geometry_.head_dim)));
  int64_t spans = 0, work = 0;
  for (int32_t s = 0; s < plan.sequences(); ++s) {
    const int32_t first_slot = plan.slots()[plan.row_starts()[s]];
    const int32_t rows = (plan.row_starts()[s + 1] - plan.row_starts()[s]) * group;
    const int32_t count = (rows + most_rows - 1) / most_rows;
    for (int32_t b = 0; b < count; ++b) {
      const int32_t row_begin = rows * b / count, row_end = rows * (b + 1) / count;
      const int32_t first = first_visible_slot(first_slot + row_begin / group, geometry_.window);
      const int32_t end = first_slot + (row_end - 1) / group + 1;
      for (int32_t head = 0; head < geometry_.kv_heads; ++head) {
        blocks_.push_back({s, head, row_begin, row_end, first, end, first / kSpanTokens, spans_of(end), -1});
        spans += spans_of(end) - first / kSpanTokens;
        work += static_cast<int64_t>(row_end - row_begin) * (end - first) * 2 * geometry_.head_dim;
      }
    }
  }
  serial_ = threads_ == 1 || work < kSerialWork;
  const int64_t wanted = kItemsPerThread * threads_;
  const bool too_few = !serial_ && static_cast<int64_t>(blocks_.size()) < wanted;
  const int64_t capacity = static_cast<int64_t>(records_.bytes() / sizeof(float));
  int64_t used = 0, before = 0;  // floats; spans of the blocks so far
  whole_.clear();
  for (size_t i = 0; i < blocks_.size(); ++i) {
    Block& block = blocks_[i];
    const int32_t count = block.span_end - block.span_begin;
    const int64_t floats = static_cast<int64_t>(count) * (block.row_end - block.row_begin) *
                           attention_record_floats(geometry_.head_dim);
    // All spans, one block's after the other's, are cut into as many equal parts as are wanted, and at block borders.
    int64_t part = before * wanted / spans + 1;
    before += count;
    if (!too_few || part * spans / wanted >= before || used + floats > capacity) {
      if (too_few && count * wanted > spans) whole_.push_back(static_cast<int32_t>(items_.size()));
      add_item(i, block.span_begin, block.span_end);
      continue;
    }
    split_ = true;
    block.records = used;
    used += floats;
    for (int32_t span = block.span_begin, next; span < block.span_end; span = next) {
      next = block.span_end - static_cast<int32_t>(std::max<int64_t>(0, before - part++ * spans / wanted));
      if (next > span) add_item(i, span, next);
    }
  }
  if (too_few) share_out_rest();
  // The most work first, so that threads end together.
  std::sort(items_.begin(), items_.end(), [](const Item& a, const Item& b) {
    return a.work != b.work ? a.work > b.work : a.block != b.block ? a.block < b.block : a.span_begin < b.span_begin;
  });
}

void AttentionSchedule::add_item(size_t index, int32_t span_begin, int32_t span_end) {
  const Block& block = blocks_[index];
  const int32_t slots = std::min(span_end * kSpanTokens, block.slot_end) - std::max(span_begin * kSpanTokens, block.slot_begin);
  items_.push_back({static_cast<int32_t>(index), span_begin, span_end, static_cast<int64_t>(block.row_end - block.row_begin) * slots});
}

// Long blocks that cannot be split by spans, and are no multiple of the threads: the last ones are cut by rows, so that
// every thread gets as much. Cutting all of them would make the threads convert the same keys and values again.
void AttentionSchedule::share_out_rest() {
  const size_t rest = whole_.size() % static_cast<size_t>(threads_);
  for (size_t i = whole_.size() - rest; i < whole_.size(); ++i) {
    Item& item = items_[static_cast<size_t>(whole_[i])];
    const size_t index = static_cast<size_t>(item.block);
    const Block whole = blocks_[index];
    const int32_t wanted = (whole.row_end - whole.row_begin + threads_ - 1) / threads_;
    const int32_t part = (wanted + kRowUnit - 1) / kRowUnit * kRowUnit;
    blocks_[index].row_end = std::min(whole.row_begin + part, whole.row_end);
    item.work = item.work * (blocks_[index].row_end - whole.row_begin) / (whole.row_end - whole.row_begin);
    for (int32_t row = whole.row_begin + part; row < whole.row_end; row += part) {
      Block cut = whole;
      cut.row_begin = row;
      cut.row_end = std::min(row + part, whole.row_end);
      blocks_.push_back(cut);
      add_item(blocks_.size() - 1, cut.span_begin, cut.span_end);
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
          block.row_end,
          {}};
}

AttentionUpcoming AttentionOp::start_of(const StepContext& context, const AttentionSchedule::Item& item) const {
  const AttentionSchedule::Block& block = schedule_->blocks()[static_cast<size_t>(item.block)];
  return {context.plan.page_table(schedule_->geometry().group, block.sequence), block.kv_head,
          std::max(block.slot_begin, item.span_begin * kSpanTokens), std::min(block.slot_end, item.span_end * kSpanTokens)};
}

void AttentionOp::attend(const StepContext& context, float* out) const {
  const AttentionKernels& kernels = attention_kernels();
  const std::vector<AttentionSchedule::Item>& items = schedule_->items();
  const int64_t record = attention_record_floats(arguments_.head_dim);
  std::atomic<size_t> next{0};
  // Every thread begins with an item of its own and knows the next one early, so that its first keys can be brought in.
  const auto work = [&](int index, int count) {
    for (size_t i = static_cast<size_t>(index), after; i < items.size(); i = after) {
      after = static_cast<size_t>(count) + next.fetch_add(1, std::memory_order_relaxed);
      const AttentionSchedule::Item& item = items[i];
      const AttentionSchedule::Block& block = schedule_->blocks()[static_cast<size_t>(item.block)];
      float* records = nullptr;
      if (block.records >= 0) {
        const int64_t skipped = static_cast<int64_t>(item.span_begin - block.span_begin) * (block.row_end - block.row_begin);
        records = schedule_->records() + block.records + skipped * record;
      }
      AttentionBlock rows = block_of(context, block, out);
      if (after < items.size()) rows.upcoming = start_of(context, items[after]);
      kernels.attend(arguments_, rows, item.span_begin, item.span_end, records, context.scratch(index));
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
