// Speed of attention over fp16 keys and values, as shares of the machine's limits.
//
//   bench_attention HEADS KV_HEADS HEAD_DIM THREADS CONTEXT TOKENS...    e.g. bench_attention 9 3 64 2 4096 1 16 64 512
//
// CONTEXT slots stand in the cache before the step's TOKENS. Work is split as row blocks of one KV head over threads;
// pages lie in random order. Shares are of the read bandwidth and of the fp32 fma peak measured beside each sample;
// medians, and the best in parentheses. TOKENMILL_ISA selects the instruction-set path.
#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <random>
#include <vector>

#include "kernels/attention.h"
#include "limits.h"
#include "platform/isa.h"

using namespace tokenmill;
using namespace tokenmill::limits;

namespace {

constexpr int kSamples = 25;
constexpr size_t kRotatedBytes = size_t{128} << 20;  // of keys and values: layers, read one after the other
constexpr double kSampleSeconds = 0.01;

struct Shape {
  int32_t heads, kv_heads, head_dim;
};

void bench(const Shape& shape, int32_t context, int32_t tokens, ThreadPool& pool, Machine& machine) {
  const int32_t group = shape.heads / shape.kv_heads, pages = (context + tokens + kPageTokens - 1) / kPageTokens;
  const size_t head_bytes = static_cast<size_t>(kPageTokens * shape.head_dim) * 2;
  const size_t page_bytes = head_bytes * static_cast<size_t>(shape.kv_heads), plane_bytes = page_bytes * static_cast<size_t>(pages);
  const auto layers = std::max<size_t>(1, kRotatedBytes / (2 * plane_bytes));
  const AlignedBytes planes = aligned_bytes(2 * plane_bytes * layers + kPlaneSlack);
  std::vector<int32_t> table(static_cast<size_t>(pages));
  std::iota(table.begin(), table.end(), 0);
  std::shuffle(table.begin(), table.end(), std::mt19937(0));
  std::vector<float> q(static_cast<size_t>(tokens * shape.heads * shape.head_dim)), out(q.size());
  for (size_t i = 0; i < q.size(); ++i) q[i] = static_cast<float>(i % 89) / 890.0f;
  std::vector<AlignedBytes> scratch;
  for (int i = 0; i < pool.size(); ++i) scratch.push_back(aligned_bytes(attention_scratch_bytes(shape.head_dim)));

  AttentionArguments arguments{};
  arguments.head_dim = shape.head_dim;
  arguments.group = group;
  arguments.q_scale = 0.1f;
  arguments.q_stride = arguments.out_stride = shape.heads * shape.head_dim;
  const int32_t rows = tokens * group, spans = (context + tokens + kSpanTokens - 1) / kSpanTokens;
  const int32_t blocks = (rows + kQueryRows - 1) / kQueryRows;
  size_t layer = 0;
  const auto run = [&] {
    uint8_t* keys = planes.get() + 2 * plane_bytes * (layer++ % layers);
    arguments.cache = {KvElement::kF16, keys, keys + plane_bytes, page_bytes, head_bytes};
    std::atomic<int32_t> next{0};
    pool.run([&](int index, int) {
      for (int32_t i; (i = next.fetch_add(1)) < blocks * shape.kv_heads;) {
        const int32_t head = i % shape.kv_heads, begin = (blocks - 1 - i / shape.kv_heads) * kQueryRows;
        const int32_t column = head * group * shape.head_dim;
        const AttentionBlock block{table.data(), q.data() + column, out.data() + column, head, context, begin, std::min(rows, begin + kQueryRows)};
        attention_kernels().attend(arguments, block, 0, spans, nullptr, scratch[static_cast<size_t>(index)].get());
      }
    });
  };
  double start = now();
  run();
  const int repeats = std::max(1, static_cast<int>(kSampleSeconds / (now() - start)));
  const double seen = static_cast<double>(tokens) * context + static_cast<double>(tokens) * (tokens + 1) / 2;
  const double operations = 4.0 * seen * shape.heads * shape.head_dim, bytes = 2.0 * (context + tokens) * shape.kv_heads * shape.head_dim * 2;
  std::vector<double> seconds, of_bytes, of_operations;
  Limits best{0, 0};
  for (int sample = 0; sample < kSamples; ++sample) {
    const Limits before = machine.measure();
    start = now();
    for (int i = 0; i < repeats; ++i) run();
    seconds.push_back((now() - start) / repeats);
    const Limits after = machine.measure();
    const Limits limit{std::max(before.bytes, after.bytes), std::max(before.operations, after.operations)};
    best = {std::max(best.bytes, limit.bytes), std::max(best.operations, limit.operations)};
    of_bytes.push_back(bytes / seconds.back() / limit.bytes);
    of_operations.push_back(operations / seconds.back() / limit.operations);
  }
  const double least = *std::min_element(seconds.begin(), seconds.end());
  std::printf("context %5d tokens %4d  %9.1f us  %6.2f GB/s %5.1f %% (%5.1f)  %6.1f Gflop/s %5.1f %% (%5.1f)\n", context, tokens,
              median(seconds) * 1e6, bytes / median(seconds) / 1e9, 100 * median(of_bytes), 100 * bytes / least / best.bytes,
              operations / median(seconds) / 1e9, 100 * median(of_operations), 100 * operations / least / best.operations);
  std::fflush(stdout);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 7) {
    std::fprintf(stderr, "usage: %s HEADS KV_HEADS HEAD_DIM THREADS CONTEXT TOKENS...\n", argv[0]);
    return 2;
  }
  const Shape shape{std::atoi(argv[1]), std::atoi(argv[2]), std::atoi(argv[3])};
  ThreadPool pool(std::atoi(argv[4]));
  Machine machine(pool, false);
  std::printf("path %s, %d threads, %d heads, %d KV heads, head size %d\n", isa_name(active_isa()).data(), pool.size(),
              shape.heads, shape.kv_heads, shape.head_dim);
  for (int i = 6; i < argc; ++i) bench(shape, std::atoi(argv[5]), std::atoi(argv[i]), pool, machine);
}
