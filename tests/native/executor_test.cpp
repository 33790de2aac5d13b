// A small model through the executor: the same logits, bit for bit, on every path and with any number of threads.
//
// Meant for the thread sanitizer too: all ops run in parallel regions, with more threads than most machines have CPUs.
#include <cmath>
#include <memory>

#include "executor/executor.h"
#include "paths.h"

using namespace tokenmill;

namespace {

constexpr int32_t kVocabulary = 160, kHidden = 96, kHeads = 6, kKvHeads = 2, kHeadDim = 16, kMlp = 224, kLayers = 2;
constexpr StepLimits kLimits{.tokens = 320, .sequences = 3, .sampled = 8, .context = 512};
constexpr int32_t kPages = 3 * 512 / kPageTokens, kTableStride = 512 / kPageTokens;

struct Matrix {
  WeightFormat format;
  int32_t n, k;
  AlignedBytes packed;

  Matrix(WeightFormat f, int32_t rows, int32_t columns, std::mt19937& random) : format(f), n(rows), k(columns), packed(aligned_bytes(bytes())) {
    std::vector<uint8_t> source(static_cast<size_t>(n) * source_row_bytes(format, k));
    if (format == WeightFormat::kF32) {
      const std::vector<float> values = normal_floats(source.size() / 4, random);
      std::memcpy(source.data(), values.data(), source.size());
    } else {  // blocks of 32 that begin with an fp16 scale: random codes, scales near 0.01
      const size_t block = source_row_bytes(format, 32);
      for (uint8_t& byte : source) byte = static_cast<uint8_t>(random());
      for (size_t at = 0; at < source.size(); at += block) {
        const uint16_t scale = static_cast<uint16_t>(0x2000 + random() % 256);
        std::memcpy(&source[at], &scale, 2);
      }
    }
    pack_rows(format, source.data(), n, k, packed.get(), 0, (n + kBlockRows - 1) / kBlockRows);
  }
  size_t bytes() const { return packed_bytes(format, n, k); }
  PackedWeight weight() const { return {format, n, k, packed.get()}; }
};

struct Layer {
  Matrix q, k, v, o, gate, up, down;
  std::vector<float> attention_norm, mlp_norm;

  explicit Layer(std::mt19937& random)
      : q(WeightFormat::kQ8_0, kHeads * kHeadDim, kHidden, random),
        k(WeightFormat::kQ8_0, kKvHeads * kHeadDim, kHidden, random),
        v(WeightFormat::kQ4_0, kKvHeads * kHeadDim, kHidden, random),
        o(WeightFormat::kQ4_0, kHidden, kHeads * kHeadDim, random),
        gate(WeightFormat::kQ4_0, kMlp, kHidden, random),
        up(WeightFormat::kIq4Nl, kMlp, kHidden, random),
        down(WeightFormat::kQ5_0, kHidden, kMlp, random),
        attention_norm(normal_floats(kHidden, random)),
        mlp_norm(normal_floats(kHidden, random)) {}
};

struct Model {
  Matrix embedding;
  std::vector<Layer> layers;
  std::vector<float> output_norm;

  explicit Model(std::mt19937& random) : embedding(WeightFormat::kF32, kVocabulary, kHidden, random), output_norm(normal_floats(kHidden, random)) {
    for (int i = 0; i < kLayers; ++i) layers.emplace_back(random);
  }
};

// An executor with the model's ops; every value has memory of its own.
class Run {
 public:
  Run(const Model& model, int threads) : executor_(kLimits, kVocabulary, std::make_shared<ThreadPool>(threads)) {
    const int32_t group = executor_.add_kv_group({kLayers, kKvHeads, kHeadDim, 0, KvElement::kF16, kPages});
    std::vector<double> frequencies;
    for (int i = 0; i < kHeadDim / 2; ++i) frequencies.push_back(std::pow(10000.0, -2.0 * i / kHeadDim));
    Id x = floats(kHidden);
    executor_.add_embed(model.embedding.weight(), model.embedding.bytes(), x, 1.0f);
    for (int32_t index = 0; index < kLayers; ++index) {
      const Layer& layer = model.layers[static_cast<size_t>(index)];
      const Id normed = codes(kHidden), q = floats(kHeads * kHeadDim), k = floats(kKvHeads * kHeadDim), v = floats(kKvHeads * kHeadDim);
      executor_.add_rms_norm(x, layer.attention_norm, {std::nullopt, {normed}}, 1e-6f, kHidden, 0.0f);
      const Executor::Part qkv[] = {part(normed, layer.q, q), part(normed, layer.k, k), part(normed, layer.v, v)};
      executor_.add_linear_group(qkv);
      executor_.add_rope(q, q, {kHeads, kHeadDim, kHeadDim, RopeStyle::kHalf}, frequencies, 1.0);
      executor_.add_rope(k, k, {kKvHeads, kHeadDim, kHeadDim, RopeStyle::kHalf}, frequencies, 1.0);
      const Id attended = codes(kHeads * kHeadDim), after = floats(kHidden);
      executor_.add_attention(q, k, v, {std::nullopt, {attended}}, index, group, kHeads, 0.25, 0.0);
      const Executor::Part o[] = {part(attended, layer.o, after, x)};
      executor_.add_linear_group(o);
      const Id mlp_in = codes(kHidden), gate = floats(kMlp), up = floats(kMlp), gated = codes(kMlp), out = floats(kHidden);
      executor_.add_rms_norm(after, layer.mlp_norm, {std::nullopt, {mlp_in}}, 1e-6f, kHidden, 0.0f);
      const Executor::Part gate_up[] = {part(mlp_in, layer.gate, gate), part(mlp_in, layer.up, up)};
      executor_.add_linear_group(gate_up);
      executor_.add_gated_activation(gate, up, {std::nullopt, {gated}}, Activation::kSilu);
      const Executor::Part down[] = {part(gated, layer.down, out, after)};
      executor_.add_linear_group(down);
      x = out;
    }
    const Id sampled = floats(kHidden, true), normed = floats(kHidden, true);
    logits_ = floats(kVocabulary, true);
    executor_.add_gather_sampled(x, sampled);
    executor_.add_rms_norm(sampled, model.output_norm, {normed, {}}, 1e-6f, kHidden, 0.0f);
    const Executor::Part head[] = {part(normed, model.embedding, logits_)};
    executor_.add_linear_group(head);
    executor_.prepare();
  }

  // Logits of the last token of each sequence; sequence s has lengths[s] tokens so far and gets counts[s] more.
  std::vector<uint8_t> step(const std::vector<int32_t>& lengths, const std::vector<int32_t>& counts) {
    const int32_t sequences = static_cast<int32_t>(counts.size());
    std::vector<int32_t> ids, positions, starts{0}, sampled, tables;
    for (int32_t s = 0; s < sequences; ++s) {
      const int32_t length = lengths[static_cast<size_t>(s)];
      for (int32_t i = length; i < length + counts[static_cast<size_t>(s)]; ++i) {
        ids.push_back((31 * i + 57 * s) % kVocabulary);
        positions.push_back(i);
      }
      starts.push_back(static_cast<int32_t>(ids.size()));
      sampled.push_back(starts.back() - 1);
      for (int32_t page = 0; page < kTableStride; ++page) tables.push_back(page * 3 + s);
    }
    std::vector<int32_t> plan{1, static_cast<int32_t>(ids.size()), sequences, sequences, 1, kTableStride, 0, 0};
    for (const std::vector<int32_t>* section : {&ids, &positions, &positions, &starts, &sampled, &tables}) {
      plan.insert(plan.end(), section->begin(), section->end());
    }
    executor_.run(plan, 0, executor_.op_count());
    std::vector<float> out;
    for (int32_t s = 0; s < sequences; ++s) {
      const Value& value = executor_.value(logits_);
      const float* row = reinterpret_cast<const float*>(executor_.memory(logits_) + static_cast<size_t>(s) * value.row_bytes);
      out.insert(out.end(), row, row + kVocabulary);
    }
    std::vector<uint8_t> bytes;
    append(bytes, out);
    return bytes;
  }

 private:
  using Id = Executor::ValueId;

  Id add(int32_t width, ActivationFormat format, bool sampled) {
    const size_t row_bytes = activation_row_bytes(format, width);
    const Id id = executor_.add_value({arena_, row_bytes, width, format, sampled});
    arena_ += row_bytes * static_cast<size_t>(sampled ? kLimits.sampled : kLimits.tokens);
    return id;
  }
  Id floats(int32_t width, bool sampled = false) { return add(width, ActivationFormat::kF32, sampled); }
  Id codes(int32_t width) { return add(width, ActivationFormat::kInt8Group32, false); }

  static Executor::Part part(Id x, const Matrix& matrix, Id out, std::optional<Id> residual = std::nullopt) {
    return {x, matrix.weight(), matrix.bytes(), out, {}, residual};
  }

  Executor executor_;
  size_t arena_ = 0;
  Id logits_ = 0;
};

bool finite(const std::vector<uint8_t>& bytes) {
  std::vector<float> values(bytes.size() / sizeof(float));
  std::memcpy(values.data(), bytes.data(), bytes.size());
  for (float value : values) {
    if (!std::isfinite(value)) return false;
  }
  return true;
}

// Prefill of three sequences, decode steps, then a chunk beside decodes.
std::vector<uint8_t> whole_run(const Model& model, int threads) {
  Run run(model, threads);
  std::vector<uint8_t> all = run.step({0, 0, 0}, {290, 5, 20});
  for (int32_t i = 0; i < 6; ++i) {
    const std::vector<uint8_t> logits = run.step({290 + i, 5 + i, 20 + i}, {1, 1, 1});
    all.insert(all.end(), logits.begin(), logits.end());
  }
  const std::vector<uint8_t> logits = run.step({296, 11, 26}, {1, 64, 1});
  all.insert(all.end(), logits.begin(), logits.end());
  return all;
}

}  // namespace

int main() {
  Checks checks;
  std::mt19937 random(13);
  print_paths();
  const Model model(random);
  expect_same_on_all_paths(checks, "logits", [&] {
    const std::string path(isa_name(active_isa()));
    const std::vector<uint8_t> want = whole_run(model, 1);
    checks.expect(finite(want), "finite logits on " + path);
    for (int threads : {2, 3, 5}) checks.expect(whole_run(model, threads) == want, std::to_string(threads) + " threads on " + path);
    return want;
  });
  return checks.finish();
}
