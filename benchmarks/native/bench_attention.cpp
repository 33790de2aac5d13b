// Speed of the attention op over fp16 keys and values, as shares of the machine's limits.
//
//   bench_attention MODEL THREADS SEQUENCES CONTEXT TOKENS...     e.g. bench_attention qwen-1.5b 2 1 8192 1
//
// Each of SEQUENCES sequences has CONTEXT slots in the cache and gets TOKENS more. The op runs in an executor, with its
// schedule, its writes and its merges, layer after layer over more keys and values than caches hold. Pages lie in
// random order, then in ascending order. Shares are of the read bandwidth and of the fp32 fma peak measured beside each
// sample; medians, and the best sample over the best limit in parentheses.
// TOKENMILL_ISA selects the instruction-set path.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "executor/executor.h"
#include "limits.h"
#include "platform/isa.h"

using namespace tokenmill;
using namespace tokenmill::limits;

namespace {

constexpr int kSamples = 15;
constexpr double kSampleSeconds = 0.01;
constexpr size_t kRotatedBytes = size_t{128} << 20;  // of keys and values: layers, read one after the other

struct Shape {
  const char* name;
  int32_t heads, kv_heads, head_dim;
};
constexpr Shape kShapes[] = {
    {"smollm2", 9, 3, 64}, {"qwen-0.5b", 14, 2, 64}, {"qwen-1.5b", 12, 2, 128}, {"gemma-270m", 4, 1, 256}};

struct Load {
  int32_t sequences, context, tokens;  // tokens of each sequence

  int32_t pages() const { return (context + tokens + kPageTokens - 1) / kPageTokens; }  // of each sequence
  StepLimits limits() const { return {sequences * tokens, sequences, 1, pages() * kPageTokens}; }
};

// The step that computes the last tokens of every sequence, as src/tokenmill/program/step.py lays it.
std::vector<int32_t> plan_of(const Load& load, bool random_pages) {
  const int32_t tokens = load.sequences * load.tokens;
  std::vector<int32_t> pages(static_cast<size_t>(load.sequences * load.pages()));
  std::iota(pages.begin(), pages.end(), 0);
  if (random_pages) std::shuffle(pages.begin(), pages.end(), std::mt19937(0));
  std::vector<int32_t> plan{1, tokens, load.sequences, 0, 1, load.pages(), 0, 0};
  plan.insert(plan.end(), static_cast<size_t>(tokens), 0);  // token ids
  for (int section = 0; section < 2; ++section) {           // positions, slots
    for (int32_t i = 0; i < tokens; ++i) plan.push_back(load.context + i % load.tokens);
  }
  for (int32_t s = 0; s <= load.sequences; ++s) plan.push_back(s * load.tokens);
  plan.insert(plan.end(), pages.begin(), pages.end());
  return plan;
}

// Layers of attention that share their operands.
class Layers {
 public:
  Layers(const Shape& shape, const Load& load, int32_t layers, int threads) : executor_(load.limits(), 1, std::make_shared<ThreadPool>(threads)) {
    const int32_t group = executor_.add_kv_group(
        {layers, shape.kv_heads, shape.head_dim, 0, KvElement::kF16, load.sequences * load.pages()});
    const Executor::ValueId q = floats(shape.heads * shape.head_dim), k = floats(shape.kv_heads * shape.head_dim);
    const Executor::ValueId v = floats(shape.kv_heads * shape.head_dim), out = floats(shape.heads * shape.head_dim);
    for (int32_t layer = 0; layer < layers; ++layer) executor_.add_attention(q, k, v, {out, {}}, layer, group, shape.heads, 0.1, 0.0);
    executor_.prepare();
    for (int plane = 0; plane < 2; ++plane) {  // small normal numbers
      const size_t bytes = executor_.cache().page_bytes(group) * static_cast<size_t>(load.sequences * load.pages());
      std::memset(executor_.cache().plane(group, plane), 0x2c, bytes);
    }
    for (const Executor::ValueId id : {q, k, v}) {
      float* values = reinterpret_cast<float*>(executor_.memory(id));
      const size_t count = executor_.value(id).row_bytes / sizeof(float) * static_cast<size_t>(load.sequences * load.tokens);
      for (size_t i = 0; i < count; ++i) values[i] = static_cast<float>(i % 89) / 890.0f;
    }
  }

  // Seconds of one layer, over the first `layers`.
  double run(const std::vector<int32_t>& plan, int32_t layers) {
    const double start = now();
    executor_.run(plan, 0, layers);
    return (now() - start) / layers;
  }

 private:
  Executor::ValueId floats(int32_t width) {
    const size_t row_bytes = activation_row_bytes(ActivationFormat::kF32, width);
    const Executor::ValueId id = executor_.add_value({arena_, row_bytes, width, ActivationFormat::kF32, false});
    arena_ += row_bytes * static_cast<size_t>(executor_.limits().tokens);
    return id;
  }

  Executor executor_;
  size_t arena_ = 0;
};

void bench(const Shape& shape, const Load& load, Machine& machine, int threads) {
  const double slots = load.context + load.tokens, seen = load.tokens * (load.context + (load.tokens + 1) / 2.0);
  const double bytes = load.sequences * slots * shape.kv_heads * shape.head_dim * 2 * sizeof(uint16_t);
  const double operations = load.sequences * seen * shape.heads * shape.head_dim * 4;
  const auto layers = static_cast<int32_t>(std::max(1.0, static_cast<double>(kRotatedBytes) / bytes));
  Layers program(shape, load, layers, threads);
  for (const bool random_pages : {true, false}) {
    const std::vector<int32_t> plan = plan_of(load, random_pages);
    program.run(plan, 1);
    const auto count = static_cast<int32_t>(std::clamp(kSampleSeconds / program.run(plan, 1), 1.0, static_cast<double>(layers)));
    std::vector<double> seconds, of_bytes, of_operations;
    Limits best{0, 0};
    for (int sample = 0; sample < kSamples; ++sample) {
      const Limits before = machine.measure();
      seconds.push_back(program.run(plan, count));
      const Limits after = machine.measure();
      const Limits limit{std::max(before.bytes, after.bytes), std::max(before.operations, after.operations)};
      best = {std::max(best.bytes, limit.bytes), std::max(best.operations, limit.operations)};
      of_bytes.push_back(bytes / seconds.back() / limit.bytes);
      of_operations.push_back(operations / seconds.back() / limit.operations);
    }
    const double least = *std::min_element(seconds.begin(), seconds.end());
    std::printf("%-10s %2d x %5d + %4d %-9s %9.1f us  %5.2f GB/s %5.1f %% (%5.1f)  %5.1f Gflop/s %5.1f %% (%5.1f)\n", shape.name,
                load.sequences, load.context, load.tokens, random_pages ? "random" : "ascending", median(seconds) * 1e6,
                bytes / median(seconds) / 1e9, 100 * median(of_bytes), 100 * bytes / least / best.bytes,
                operations / median(seconds) / 1e9, 100 * median(of_operations), 100 * operations / least / best.operations);
    std::fflush(stdout);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const Shape* shape = nullptr;
  for (const Shape& known : kShapes) {
    if (argc > 5 && std::strcmp(argv[1], known.name) == 0) shape = &known;
  }
  if (shape == nullptr) {
    std::fprintf(stderr, "usage: %s smollm2|qwen-0.5b|qwen-1.5b|gemma-270m THREADS SEQUENCES CONTEXT TOKENS...\n", argv[0]);
    return 2;
  }
  ThreadPool pool(std::atoi(argv[2]));
  Machine machine(pool, false);
  std::printf("path %s, %d threads\n", isa_name(active_isa()).data(), pool.size());
  for (int i = 5; i < argc; ++i) bench(*shape, {std::atoi(argv[3]), std::atoi(argv[4]), std::atoi(argv[i])}, machine, pool.size());
}
