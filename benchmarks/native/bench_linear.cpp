// Speed of Linear by weight format and row count, as shares of the machine's limits.
//
//   bench_linear FORMAT N K THREADS ROWS...        e.g. bench_linear q4_k 8960 1536 2 1 4 8 16 64 512
//
// Every sample is framed by the limits themselves (streaming reads and int8 dot products, or fma for 16- and 32-bit
// weights, with the same threads), and its share is of the better of the two framing figures: a virtual machine's
// limits move while one looks. Medians over the samples; in parentheses the best sample over the best limit. Matrices are rotated so that weights come from memory.
// TOKENMILL_ISA selects the instruction-set path.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "kernels/linear.h"
#include "kernels/roofline.h"
#include "platform/isa.h"
#include "platform/thread_pool.h"

using namespace tokenmill;

namespace {

constexpr int kSamples = 25;
constexpr size_t kRotatedBytes = size_t{192} << 20;
constexpr size_t kReadBytes = size_t{96} << 20;
constexpr double kSampleSeconds = 0.01;

constexpr const char* kNames[kWeightFormatCount] = {"f32",  "f16",  "bf16",   "q4_0", "q4_1", "q5_0", "q5_1",
                                                    "q8_0", "iq4_nl", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k"};

struct AlignedFree {
  void operator()(void* p) const { std::free(p); }
};
using AlignedBytes = std::unique_ptr<uint8_t[], AlignedFree>;

AlignedBytes aligned_bytes(size_t bytes) {
  AlignedBytes data(static_cast<uint8_t*>(std::aligned_alloc(64, (bytes + 8191) / 64 * 64)));
  // Every fp16 and fp32 among these bytes is a small normal number.
  uint32_t state = 1;
  for (size_t i = 0; i < bytes + 4096; ++i) data[i] = static_cast<uint8_t>(0x20 | ((state = state * 1664525 + 1013904223) >> 28));
  return data;
}

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

double median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + static_cast<ptrdiff_t>(values.size() / 2), values.end());
  return values[values.size() / 2];
}

struct Limits {
  double bytes, operations;  // per second
};

class Machine {
 public:
  Machine(ThreadPool& pool, bool integer) : pool_(pool), integer_(integer), data_(aligned_bytes(kReadBytes)) {
    while (timed_operations() < 0.003) iterations_ *= 2;
  }

  Limits measure() {
    const size_t each = kReadBytes / static_cast<size_t>(pool_.size()) / 1024 * 1024;
    const double start = now();
    pool_.run([&](int index, int) { sink_ = roofline_kernels().read(data_.get() + static_cast<size_t>(index) * each, each); });
    const double read = now() - start;
    const int64_t each_operations = integer_ ? roofline_kernels().int8_operations : roofline_kernels().f32_operations;
    const double operations = static_cast<double>(each_operations * iterations_) * pool_.size();
    return {static_cast<double>(each) * pool_.size() / read, operations / timed_operations()};
  }

 private:
  double timed_operations() {
    const double start = now();
    pool_.run([&](int, int) {
      if (integer_) {
        sink_ = roofline_kernels().dot_int8(iterations_);
      } else {
        sink_ = static_cast<int32_t>(roofline_kernels().fma_f32(iterations_));
      }
    });
    return now() - start;
  }

  ThreadPool& pool_;
  bool integer_;
  AlignedBytes data_;
  int64_t iterations_ = 1000;
  volatile int32_t sink_ = 0;
};

void bench(WeightFormat format, int32_t n, int32_t k, int32_t rows, ThreadPool& pool, Machine& machine, const uint8_t* weights) {
  const ActivationFormat activation = activation_format(format);
  const size_t stride = activation_row_bytes(activation, k);
  const AlignedBytes x = aligned_bytes(stride * static_cast<size_t>(rows));
  const AlignedBytes y = aligned_bytes(sizeof(float) * static_cast<size_t>(rows) * static_cast<size_t>(n));
  std::vector<AlignedBytes> scratch;
  for (int i = 0; i < pool.size(); ++i) scratch.push_back(aligned_bytes(linear_scratch_bytes()));
  std::vector<float> values(static_cast<size_t>(k));
  for (int32_t i = 0; i < k; ++i) values[static_cast<size_t>(i)] = static_cast<float>(i % 97) - 48.0f;
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
    const AlignedBytes weights = aligned_bytes(bytes * std::max<size_t>(1, kRotatedBytes / bytes));
    Machine machine(pool, activation_format(format) != ActivationFormat::kF32);
    for (int i = 5; i < argc; ++i) bench(format, n, k, std::atoi(argv[i]), pool, machine, weights.get());
  }
}
