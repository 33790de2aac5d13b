#include "executor/pointwise_ops.h"

#include <cmath>
#include <cstring>

namespace tokenmill {

RopeTable::RopeTable(std::vector<double> frequencies, double magnitude, int32_t tokens)
    : frequencies_(std::move(frequencies)),
      magnitude_(magnitude),
      angles_(static_cast<size_t>(tokens) * 2 * frequencies_.size()) {}

void RopeTable::fill(const StepContext& context) {
  const size_t half = frequencies_.size();
  const int32_t* positions = context.plan.positions();
  // A sine and cosine in double take about 40 ns.
  for_rows(context, context.plan.tokens(), static_cast<int32_t>(half) * 160, [&](int32_t row, uint8_t*) {
    float* cosines = angles_.data() + static_cast<size_t>(row) * 2 * half;
    for (size_t i = 0; i < half; ++i) {
      const double angle = static_cast<double>(positions[row]) * frequencies_[i];
      cosines[i] = static_cast<float>(std::cos(angle) * magnitude_);
      cosines[half + i] = static_cast<float>(std::sin(angle) * magnitude_);
    }
  });
}

void EmbedOp::run(const StepContext& context) const {
  for_rows(context, context.rows(out_), 2 * out_.width, [&](int32_t row, uint8_t*) {
    float* out = context.floats(out_, row);
    linear_kernels().decode_row(weight_, context.plan.token_ids()[row], out);
    if (scale_ != 1.0f) pointwise_kernels().scale(out, scale_, out_.width, out);
  });
}

void RmsNormOp::run(const StepContext& context) const {
  for_rows(context, context.rows(x_), x_.width, [&](int32_t row, uint8_t* scratch) {
    float* out = outputs_.out ? context.floats(*outputs_.out, row) : reinterpret_cast<float*>(scratch);
    pointwise_kernels().rms_norm(context.floats(x_, row), weight_, weight_offset_, eps_, x_.width, group_width_, out);
    outputs_.finish(context, row, out, x_.width);
  });
}

void RopeOp::run(const StepContext& context) const {
  for_rows(context, context.rows(x_), x_.width, [&](int32_t row, uint8_t*) {
    pointwise_kernels().rope(arguments_, context.floats(x_, row), table_->row(row), context.floats(out_, row));
  });
}

void GatedActivationOp::run(const StepContext& context) const {
  for_rows(context, context.rows(gate_), 4 * gate_.width, [&](int32_t row, uint8_t* scratch) {
    float* out = outputs_.out ? context.floats(*outputs_.out, row) : reinterpret_cast<float*>(scratch);
    pointwise_kernels().gated_activation(activation_, context.floats(gate_, row), context.floats(up_, row), gate_.width, out);
    outputs_.finish(context, row, out, gate_.width);
  });
}

void AddOp::run(const StepContext& context) const {
  for_rows(context, context.rows(out_), out_.width, [&](int32_t row, uint8_t*) {
    pointwise_kernels().add(context.floats(a_, row), context.floats(b_, row), out_.width, context.floats(out_, row));
  });
}

void SoftCapOp::run(const StepContext& context) const {
  // Logits are few rows and wide: columns are shared out, not rows. Elements are independent.
  const int32_t rows = context.rows(x_);
  context.pool.run([&](int index, int count) {
    const auto [begin, end] = ThreadPool::share(x_.width, index, count);
    for (int32_t row = 0; row < rows; ++row) {
      pointwise_kernels().softcap(context.floats(x_, row) + begin, cap_, static_cast<int32_t>(end - begin),
                                  context.floats(out_, row) + begin);
    }
  });
}

void GatherSampledOp::run(const StepContext& context) const {
  for_rows(context, context.plan.sampled(), x_.width, [&](int32_t row, uint8_t*) {
    std::memcpy(context.row(out_, row), context.row(x_, context.plan.sampled_rows()[row]),
                static_cast<size_t>(x_.width) * sizeof(float));
  });
}

void QuantizeOp::run(const StepContext& context) const {
  for_rows(context, context.rows(x_), x_.width, [&](int32_t row, uint8_t*) {
    linear_kernels().quantize_row(context.floats(x_, row), x_.width, out_.format, context.row(out_, row));
  });
}

}  // namespace tokenmill
