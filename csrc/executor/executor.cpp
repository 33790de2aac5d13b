#include "executor/executor.h"

#include <algorithm>
#include <chrono>
#include <stdexcept>
#include <string>

#include "kernels/head_screen.h"
#include "platform/float_environment.h"

namespace tokenmill {
namespace {

void require(bool condition, const char* what) {
  if (!condition) throw std::invalid_argument(what);
}

bool same_shape(const Value& a, const Value& b) { return a.width == b.width && a.sampled == b.sampled; }

void check_weight(const PackedWeight& weight, size_t bytes) {
  require(weight.data != nullptr && reinterpret_cast<uintptr_t>(weight.data) % 64 == 0, "packed weights must be 64-byte aligned");
  require(bytes >= packed_bytes(weight.format, weight.n, weight.k), "packed weight is shorter than its shape needs");
}

size_t round_up(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

}  // namespace

Executor::Executor(const StepLimits& limits, int32_t vocab_size, std::shared_ptr<ThreadPool> pool)
    : limits_(limits), vocab_size_(vocab_size), pool_(std::move(pool)) {
  require(limits.tokens > 0 && limits.sequences > 0 && limits.sampled > 0 && limits.context > 0 && vocab_size > 0,
          "step limits and vocabulary size must be positive");
}

// ---- building ------------------------------------------------------------------------------------------------------

Executor::ValueId Executor::add_value(const Value& value) {
  require(!prepared_, "the executor is prepared: nothing can be added");
  require(value.width > 0, "a value's width must be positive");
  require(value.offset % 64 == 0 && value.row_bytes % 64 == 0, "offset and row bytes of a value must be multiples of 64");
  require(value.row_bytes >= activation_row_bytes(value.format, value.width), "a value's rows overlap");
  values_.push_back(value);
  return static_cast<ValueId>(values_.size()) - 1;
}

const Value& Executor::value(ValueId id) const {
  require(id >= 0 && id < static_cast<ValueId>(values_.size()), "unknown value");
  return values_[static_cast<size_t>(id)];
}

const Value& Executor::typed(ValueId id, ActivationFormat format) const {
  const Value& found = value(id);
  require(found.format == format, "an operand has the wrong element format");
  return found;
}

RowOutputs Executor::row_outputs(const Value& like, const Outputs& outputs) const {
  RowOutputs result;
  if (outputs.out) {
    result.out = floats(*outputs.out);
    require(same_shape(like, *result.out), "an op's output must have the shape of its input");
  }
  for (ValueId id : outputs.copies) {
    const Value& copy = value(id);
    require(copy.format != ActivationFormat::kF32 && same_shape(like, copy), "an int8 copy must have its op's shape");
    result.copies.push_back(copy);
  }
  require(result.out || !result.copies.empty(), "an op must assign something");
  return result;
}

void Executor::add(std::unique_ptr<Op> op) {
  require(!prepared_, "the executor is prepared: nothing can be added");
  ops_.push_back(std::move(op));
}

void Executor::add_embed(const PackedWeight& weight, size_t weight_bytes, ValueId out, float scale) {
  check_weight(weight, weight_bytes);
  require(weight.n >= vocab_size_, "the embedding has fewer rows than the vocabulary");
  require(floats(out).width == weight.k && !value(out).sampled, "embed's output must be [tokens, columns of its weight]");
  add(std::make_unique<EmbedOp>(weight, value(out), scale));
}

void Executor::add_rms_norm(ValueId x, std::span<const float> weight, const Outputs& outputs, float eps,
                            int32_t group_width, float weight_offset) {
  require(group_width > 0 && floats(x).width % group_width == 0, "a norm's width must be a multiple of group_width");
  require(weight.size() == static_cast<size_t>(group_width), "a norm's weight must have group_width elements");
  add(std::make_unique<RmsNormOp>(value(x), weight.data(), row_outputs(value(x), outputs), eps, group_width, weight_offset));
}

void Executor::add_linear_group(std::span<const Part> parts) {
  require(!parts.empty(), "a group of linears must not be empty");
  std::vector<LinearPart> group;
  for (const Part& part : parts) {
    group.push_back(lowered(part));
    require(group.back().out.sampled == group.front().out.sampled, "a linear's rows must agree");
  }
  add(std::make_unique<LinearGroupOp>(std::move(group)));
}

LinearPart Executor::lowered(const Part& part) const {
  check_weight(part.weight, part.weight_bytes);
  const Value& x = typed(part.x, activation_format(part.weight.format));
  const Value& out = floats(part.out);
  require(x.width == part.weight.k && out.width == part.weight.n, "a linear's weight must be [out width, x width]");
  require(x.sampled == out.sampled, "a linear's rows must agree");
  require(part.bias.empty() || part.bias.size() == static_cast<size_t>(out.width), "a bias must have the output's width");
  LinearPart op{x, part.weight, out, part.bias.empty() ? nullptr : part.bias.data(), std::nullopt};
  if (part.residual) {
    op.residual = floats(*part.residual);
    require(same_shape(*op.residual, out), "a residual must have the output's shape");
  }
  return op;
}

void Executor::add_screened_head(const Part& part, const PackedWeight& screen, size_t screen_bytes, std::span<const float> bounds) {
  const LinearPart head = lowered(part);
  require(can_screen(part.weight.format), "a head of this format cannot be screened");
  require(head_ == nullptr, "a program has one head");
  require(head.bias == nullptr && !head.residual && head.out.sampled, "a screened head is a plain linear of the sampled rows");
  check_weight(screen, screen_bytes);
  require(screen.format == kScreenFormat && screen.n == part.weight.n && screen.k == part.weight.k, "a screen has its head's shape");
  require(bounds.size() == static_cast<size_t>(screen.n), "a screen has a bound for each row");
  auto op = std::make_unique<ScreenedHeadOp>(head, screen, bounds.data());
  head_ = op.get();
  add(std::move(op));
}

void Executor::add_rope(ValueId x, ValueId out, const RopeArguments& arguments, std::vector<double> frequencies, double magnitude) {
  const RopeArguments& a = arguments;
  require(a.heads > 0 && a.head_dim > 0 && a.rotary_dim > 0 && a.rotary_dim % 2 == 0 && a.rotary_dim <= a.head_dim,
          "rotary_dim must be even and at most head_dim");
  require(floats(x).width == a.heads * a.head_dim, "rope's input must be [tokens, heads * head_dim]");
  require(!value(x).sampled && same_shape(value(x), floats(out)), "rope's output must have the shape of its input");
  require(frequencies.size() == static_cast<size_t>(a.rotary_dim / 2), "rope needs rotary_dim / 2 frequencies");
  auto table = std::find_if(rope_tables_.begin(), rope_tables_.end(),
                            [&](const auto& t) { return t->serves(frequencies, magnitude); });
  if (table == rope_tables_.end()) {
    rope_tables_.push_back(std::make_unique<RopeTable>(std::move(frequencies), magnitude, limits_.tokens));
    table = rope_tables_.end() - 1;
  }
  add(std::make_unique<RopeOp>(value(x), value(out), arguments, table->get()));
}

void Executor::add_attention(ValueId q, ValueId k, ValueId v, const Outputs& outputs, int32_t layer, int32_t group,
                             int32_t heads, double scale, double softcap) {
  const KvGroup& spec = cache_.group(group);
  require(heads > 0 && heads % spec.kv_heads == 0, "heads must be a multiple of KV heads");
  require(floats(q).width == heads * spec.head_dim && !value(q).sampled, "q must be [tokens, heads * head_dim]");
  require(floats(k).width == spec.kv_heads * spec.head_dim && same_shape(value(k), floats(v)) && !value(k).sampled,
          "k and v must be [tokens, kv_heads * head_dim]");
  require(softcap >= 0, "softcap must not be negative");
  const AttentionSchedule::Geometry geometry{group, heads, spec.kv_heads, spec.head_dim, spec.window};
  auto schedule = std::find_if(schedules_.begin(), schedules_.end(), [&](const auto& s) { return s->geometry() == geometry; });
  if (schedule == schedules_.end()) {
    schedules_.push_back(std::make_unique<AttentionSchedule>(geometry, limits_, pool_->size()));
    schedule = schedules_.end() - 1;
  }
  add(std::make_unique<AttentionOp>(value(q), value(k), value(v), row_outputs(value(q), outputs), cache_.layer(group, layer),
                                    scale, softcap, schedule->get()));
}

void Executor::add_gated_activation(ValueId gate, ValueId up, const Outputs& outputs, Activation activation) {
  require(same_shape(floats(gate), floats(up)), "gate and up must have one shape");
  add(std::make_unique<GatedActivationOp>(value(gate), value(up), row_outputs(value(gate), outputs), activation));
}

void Executor::add_add(ValueId a, ValueId b, ValueId out) {
  require(same_shape(floats(a), floats(b)) && same_shape(value(a), floats(out)), "add's operands must have one shape");
  add(std::make_unique<AddOp>(value(a), value(b), value(out)));
}

void Executor::add_softcap(ValueId x, ValueId out, float cap) {
  require(cap > 0 && same_shape(floats(x), floats(out)), "softcap needs a positive cap and one shape");
  add(std::make_unique<SoftCapOp>(value(x), value(out), cap));
}

void Executor::add_gather_sampled(ValueId x, ValueId out) {
  require(!floats(x).sampled && floats(out).sampled && value(x).width == value(out).width,
          "gather reads [tokens, width] and assigns [sampled, width]");
  add(std::make_unique<GatherSampledOp>(value(x), value(out)));
}

void Executor::add_quantize(ValueId x, ValueId out) {
  require(value(out).format != ActivationFormat::kF32 && same_shape(floats(x), value(out)), "quantize's output must be int8");
  add(std::make_unique<QuantizeOp>(value(x), value(out)));
}

void Executor::prepare() {
  require(!prepared_, "the executor is prepared already");
  size_t arena = 0, spare = 0, scratch = 0;
  for (const Value& v : values_) {
    arena = std::max(arena, v.offset + v.row_bytes * static_cast<size_t>(v.sampled ? limits_.sampled : limits_.tokens));
  }
  for (const auto& op : ops_) {
    scratch = std::max(scratch, op->scratch_bytes());
    spare = std::max(spare, op->spare_floats(limits_.tokens));
  }
  for (int32_t i = 0; i < cache_.groups(); ++i) page_bounds_.push_back({cache_.group(i).pages, cache_.group(i).window});
  arena_ = Mapping(arena);
  spare_rows_ = Mapping(spare * sizeof(float));
  // Whole pages, so that no two threads write to one cache line.
  thread_scratch_bytes_ = round_up(scratch, 4096);
  thread_scratch_ = Mapping(thread_scratch_bytes_ * static_cast<size_t>(pool_->size()));
  const int64_t table = static_cast<int64_t>(limits_.context + kPageTokens - 1) / kPageTokens;
  live_plan_.reserve(static_cast<size_t>(16 + int64_t{3} * limits_.tokens + limits_.sequences + limits_.sampled +
                                         cache_.groups() * limits_.sequences * table));
  for (const auto& op : ops_) reads_.push_back(op->first_reads(pool_->size()));
  ahead_.assign(ops_.size(), nullptr);
  // Backwards and twice around: after the last weights come the next step's first.
  const ThreadPool::Stretch* next = nullptr;
  for (size_t i = 2 * ops_.size(); i-- > 0;) {
    const size_t op = i % ops_.size();
    ahead_[op] = next;
    if (!reads_[op].empty()) next = reads_[op].data();
  }
  prepared_ = true;
}

// ---- running -------------------------------------------------------------------------------------------------------

StepPlan Executor::read(std::span<const int32_t> plan) const {
  require(prepared_, "prepare() the executor before the first step");
  return StepPlan(plan, limits_, vocab_size_, page_bounds_);
}

StepContext Executor::context(const StepPlan& plan) {
  return {plan, *pool_, cache_, arena_.data(), thread_scratch_.data(), thread_scratch_bytes_,
          reinterpret_cast<float*>(spare_rows_.data()), nullptr};
}

void Executor::start(const StepContext& context) {
  for (const auto& table : rope_tables_) table->fill(context);
  for (const auto& schedule : schedules_) schedule->build(context.plan);
}

void Executor::run_op(const StepContext& context, int32_t index) {
  pool_->read_ahead(ahead_[static_cast<size_t>(index)]);
  ops_[static_cast<size_t>(index)]->run(context);
}

void Executor::run(std::span<const int32_t> words, int32_t first, int32_t last) {
  const std::lock_guard<std::mutex> lock(running_);
  const StepPlan plan = read(words);
  require(first >= 0 && first <= last && last <= op_count(), "the range of ops lies outside of the program");
  if (first == 0) {
    live_plan_.assign(words.begin(), words.end());
  } else {
    require(std::equal(words.begin(), words.end(), live_plan_.begin(), live_plan_.end()),
            "the live values belong to another plan: a new plan begins at op 0");
  }
  const FloatEnvironment environment;  // for what the caller runs alone
  const StepContext step = context(plan);
  start(step);
  for (int32_t i = first; i < last; ++i) run_op(step, i);
}

Executor::Times Executor::run_timed(std::span<const int32_t> words) {
  using Clock = std::chrono::steady_clock;
  Times times;
  times.laps.reserve(ops_.size() + 1);
  const std::lock_guard<std::mutex> lock(running_);
  const StepPlan plan = read(words);
  live_plan_.assign(words.begin(), words.end());
  const FloatEnvironment environment;
  Clock::time_point before = Clock::now();
  const auto lap = [&] {
    const Clock::time_point now = Clock::now();
    times.laps.push_back(std::chrono::duration<double>(now - before).count());
    before = now;
  };
  pool_->time_forks(&times.forks);
  const StepContext step = context(plan);
  start(step);
  lap();
  for (int32_t i = 0; i < op_count(); ++i) {
    run_op(step, i);
    lap();
  }
  pool_->time_forks(nullptr);
  return times;
}

int32_t Executor::diagnose(std::span<const int32_t> words, int32_t row) {
  const std::lock_guard<std::mutex> lock(running_);
  const StepPlan plan = read(words);
  require(row >= 0 && row < plan.tokens(), "the plan has no such row");
  const FloatEnvironment environment;
  const int32_t* starts = plan.row_starts();
  const int32_t* sampled = plan.sampled_rows();
  const int32_t* place = std::find(sampled, sampled + plan.sampled(), row);
  Watch watch{.token_begin = *(std::upper_bound(starts, starts + plan.sequences() + 1, row) - 1),
              .token_end = row + 1,
              .sampled_row = place == sampled + plan.sampled() ? -1 : static_cast<int32_t>(place - sampled)};
  StepContext step = context(plan);
  step.watch = &watch;
  start(step);
  for (int32_t i = 0; i < op_count(); ++i) {
    const Op& op = *ops_[static_cast<size_t>(i)];
    op.run(step);
    for (const Value& out : op.results()) {
      for (int32_t r = 0; r < step.rows(out); ++r) watch.see(out.sampled, r, step.floats(out, r), out.width);
    }
    if (watch.found.load(std::memory_order_relaxed)) return i;
  }
  return -1;
}

uint8_t* Executor::memory(ValueId id) const {
  require(prepared_, "prepare() the executor first");
  return arena_.data() + value(id).offset;
}

size_t Executor::scratch_bytes() const {
  size_t total = arena_.bytes() + thread_scratch_.bytes() + spare_rows_.bytes();
  for (const auto& table : rope_tables_) total += table->bytes();
  for (const auto& schedule : schedules_) total += schedule->bytes();
  return total;
}

}  // namespace tokenmill
