// Ops that work row by row.
#pragma once

#include <memory>
#include <vector>

#include "executor/op.h"
#include "kernels/pointwise.h"

namespace tokenmill {

// Cosines and sines, times the magnitude, of one RoPE configuration for the rows of a step. Computed in double from
// position times frequency and rounded to fp32 once (NUMERICS N5); ops of all layers share one table.
class RopeTable {
 public:
  RopeTable(std::vector<double> frequencies, double magnitude, int32_t tokens);

  bool serves(const std::vector<double>& frequencies, double magnitude) const {
    return frequencies == frequencies_ && magnitude == magnitude_;
  }
  void fill(const StepContext& context);
  // Cosines, then sines, of row `row`.
  const float* row(int32_t row) const { return angles_.data() + static_cast<size_t>(row) * 2 * frequencies_.size(); }
  size_t bytes() const { return angles_.size() * sizeof(float); }

 private:
  std::vector<double> frequencies_;
  double magnitude_;
  std::vector<float> angles_;
};

class EmbedOp final : public Op {
 public:
  EmbedOp(PackedWeight weight, Value out, float scale) : weight_(weight), out_(out), scale_(scale) {}
  void run(const StepContext& context) const override;
  std::vector<Value> results() const override { return {out_}; }

 private:
  PackedWeight weight_;
  Value out_;
  float scale_;
};

class RmsNormOp final : public Op {
 public:
  RmsNormOp(Value x, const float* weight, RowOutputs outputs, float eps, int32_t group_width, float weight_offset)
      : x_(x), weight_(weight), outputs_(std::move(outputs)), eps_(eps), group_width_(group_width), weight_offset_(weight_offset) {}
  void run(const StepContext& context) const override;
  size_t scratch_bytes() const override { return outputs_.out ? 0 : x_.row_bytes; }
  std::vector<Value> results() const override { return outputs_.results(); }

 private:
  Value x_;
  const float* weight_;
  RowOutputs outputs_;
  float eps_;
  int32_t group_width_;
  float weight_offset_;
};

class RopeOp final : public Op {
 public:
  RopeOp(Value x, Value out, RopeArguments arguments, const RopeTable* table)
      : x_(x), out_(out), arguments_(arguments), table_(table) {}
  void run(const StepContext& context) const override;
  std::vector<Value> results() const override { return {out_}; }

 private:
  Value x_, out_;
  RopeArguments arguments_;
  const RopeTable* table_;
};

class GatedActivationOp final : public Op {
 public:
  GatedActivationOp(Value gate, Value up, RowOutputs outputs, Activation activation)
      : gate_(gate), up_(up), outputs_(std::move(outputs)), activation_(activation) {}
  void run(const StepContext& context) const override;
  size_t scratch_bytes() const override { return outputs_.out ? 0 : gate_.row_bytes; }
  std::vector<Value> results() const override { return outputs_.results(); }

 private:
  Value gate_, up_;
  RowOutputs outputs_;
  Activation activation_;
};

class AddOp final : public Op {
 public:
  AddOp(Value a, Value b, Value out) : a_(a), b_(b), out_(out) {}
  void run(const StepContext& context) const override;
  std::vector<Value> results() const override { return {out_}; }

 private:
  Value a_, b_, out_;
};

class SoftCapOp final : public Op {
 public:
  SoftCapOp(Value x, Value out, float cap) : x_(x), out_(out), cap_(cap) {}
  void run(const StepContext& context) const override;
  std::vector<Value> results() const override { return {out_}; }

 private:
  Value x_, out_;
  float cap_;
};

class GatherSampledOp final : public Op {
 public:
  GatherSampledOp(Value x, Value out) : x_(x), out_(out) {}
  void run(const StepContext& context) const override;
  std::vector<Value> results() const override { return {out_}; }

 private:
  Value x_, out_;
};

class QuantizeOp final : public Op {
 public:
  QuantizeOp(Value x, Value out) : x_(x), out_(out) {}
  void run(const StepContext& context) const override;
  std::vector<Value> results() const override { return {}; }

 private:
  Value x_, out_;
};

}  // namespace tokenmill
