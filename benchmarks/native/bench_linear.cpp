// Speed of Linear by weight format and row count, as shares of the machine's limits.
//
//   bench_linear FORMAT N K THREADS ROWS...        e.g. bench_linear q4_k 8960 1536 2 1 4 8 16 64 512
//
// Every sample is framed by the limits themselves (streaming reads and int8 dot products, or fma for 16- and 32-bit
// weights, with the same threads), and its share is of the better of the two framing figures: a virtual machine's
// limits move while one looks. Medians over the samples; in parentheses the best sample over the best limit. Matrices are rotated so that weights come from memory.
// TOKENMILL_ISA selects the instruction-set path.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "kernels/linear.h"
#include "limits.h"
#include "platform/isa.h"

using namespace tokenmill;
using namespace tokenmill::limits;

namespace {

constexpr int kSamples = 25;
constexpr size_t kRotatedBytes = size_t{192} << 20;
constexpr double kSampleSeconds = 0.01;

constexpr const char* kNames[kWeightFormatCount] = {"f32",  "f16",  "bf16",   "q4_0", "q4_1", "q5_0", "q5_1",
                                                    "q8_0", "iq4_nl", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k"};

void bench(WeightFormat format, int32_t n, int32_t k, int32_t rows, ThreadPool& pool, Machine& machine, const uint8_t* weights) {
  const ActivationFormat activation = activation_format(format);
  const size_t stride = activation_row_bytes(activation, k);
  const AlignedBytes x = aligned_bytes(stride * static_cast<size_t>(rows));
  const AlignedBytes y = aligned_bytes(sizeof(float) * static_cast<size_t>(rows) * static_cast<size_t>(n));
  std::vector<AlignedBytes> scratch;
  for (int i = 0; i < pool.size(); ++i) scratch.push_back(aligned_bytes(linear_scratch_bytes()));
  std::vector<float> values(static_cast<size_t>(k));
  // Distributed as activations are: a kernel may look at them for a shorter way.
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  for (float& value : values) value = normal(random);
  for (int32_t row = 0; row < rows; ++row) {
    linear_kernels().quantize_row(values.data(), k, activation, x.get() + static_cast<size_t>(row) * stride);
  }

  const size_t bytes = packed_bytes(format, n, k);
  const auto matrices = static_cast<int>(std::max<size_t>(1, kRotatedBytes / bytes));
  const int32_t blocks = (n + kBlockRows - 1) / kBlockRows;
  int matrix = 0;
  const auto run = [&] {
    LinearArguments arguments{};
    arguments.weight = {format, n, k, weights + bytes * static_cast<size_t>(matrix++ % matrices)};
    arguments.x = x.get();
    arguments.x_stride = stride;
    arguments.rows = rows;
    arguments.y = reinterpret_cast<float*>(y.get());
    arguments.y_stride = n;
    pool.run([&](int index, int count) {
      const auto [begin, end] = ThreadPool::share(blocks, index, count);
      linear_kernels().linear(arguments, static_cast<int32_t>(begin), static_cast<int32_t>(end), scratch[static_cast<size_t>(index)].get());
    });
  };
  double start = now();
  run();
  const int repeats = std::max(1, static_cast<int>(kSampleSeconds / (now() - start)));

  const double operations = 2.0 * n * k * rows;
  std::vector<double> gigabytes, operation_rates, of_bytes, of_operations, of_bound;
  Limits best{0, 0};
  for (int sample = 0; sample < kSamples; ++sample) {
    const Limits before = machine.measure();
    start = now();
    for (int i = 0; i < repeats; ++i) run();
    const double seconds = (now() - start) / repeats;
    const Limits after = machine.measure();
    const double read_limit = std::max(before.bytes, after.bytes), operation_limit = std::max(before.operations, after.operations);
    best = {std::max(best.bytes, read_limit), std::max(best.operations, operation_limit)};
    gigabytes.push_back(static_cast<double>(bytes) / seconds);
    operation_rates.push_back(operations / seconds);
    of_bytes.push_back(static_cast<double>(bytes) / seconds / read_limit);
    of_operations.push_back(operations / seconds / operation_limit);
    of_bound.push_back(std::max(static_cast<double>(bytes) / read_limit, operations / (operation_limit / 2)) / seconds);
  }
  const double best_bytes = *std::max_element(gigabytes.begin(), gigabytes.end());
  const double best_operations = *std::max_element(operation_rates.begin(), operation_rates.end());
  std::printf("%-7s %6d x %-6d rows %4d  %6.2f GB/s %5.1f %% (%5.1f)  %6.3f Tops %5.1f %% (%5.1f)  bound with half the peak %5.1f %% (%5.1f)\n",
              kNames[static_cast<int>(format)], n, k, rows, median(gigabytes) / 1e9, 100 * median(of_bytes),
              100 * best_bytes / best.bytes, median(operation_rates) / 1e12, 100 * median(of_operations),
              100 * best_operations / best.operations, 100 * median(of_bound),
              100 * best_operations / operations * std::max(static_cast<double>(bytes) / best.bytes, operations / (best.operations / 2)));
  std::fflush(stdout);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 6) {
    std::fprintf(stderr, "usage: %s FORMAT|all N K THREADS ROWS...\n", argv[0]);
    return 2;
  }
  const int32_t n = std::atoi(argv[2]), k = std::atoi(argv[3]);
  ThreadPool pool(std::atoi(argv[4]));
  std::printf("path %s, %d threads\n", isa_name(active_isa()).data(), pool.size());
  for (int index = 0; index < kWeightFormatCount; ++index) {
    if (std::strcmp(argv[1], kNames[index]) != 0 && std::strcmp(argv[1], "all") != 0) continue;
    const auto format = static_cast<WeightFormat>(index);
    const size_t bytes = packed_bytes(format, n, k);
    const Mapping weights(bytes * std::max<size_t>(1, kRotatedBytes / bytes));
    fill(weights.data(), weights.bytes());
    Machine machine(pool, activation_format(format) != ActivationFormat::kF32);
    for (int i = 5; i < argc; ++i) bench(format, n, k, std::atoi(argv[i]), pool, machine, weights.data());
  }
}
