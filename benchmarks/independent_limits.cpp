// Read bandwidth and int8 peak by loops that share nothing with the kernels: plain C++ for the reads, written assembly
// for the products. roofline_check.py compiles this and sets it beside `tokenmill bench roofline`.
//
//     independent_limits THREADS MEBIBYTES SECONDS   prints bytes per second and int8 operations per second

#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <thread>
#include <vector>

namespace {

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Best time of `job(thread)` on all threads at once, repeated for `seconds`.
template <class Job>
double best_seconds(int threads, double seconds, Job job) {
  double best = 1e300;
  for (const double end = now() + seconds; now() < end;) {
    std::vector<std::thread> workers;
    const double start = now();
    for (int t = 1; t < threads; ++t) workers.emplace_back(job, t);
    job(0);
    for (std::thread& worker : workers) worker.join();
    best = std::min(best, now() - start);
  }
  return best;
}

// STREAM's read: the sum of an array, eight sums side by side, left to the compiler.
uint64_t sum(const uint64_t* data, size_t count) {
  uint64_t s[8] = {};
  for (size_t i = 0; i < count; i += 8) {
    for (int j = 0; j < 8; ++j) s[j] += data[i + j];
  }
  return s[0] + s[1] + s[2] + s[3] + s[4] + s[5] + s[6] + s[7];
}

constexpr int64_t kIterations = 4'000'000;
constexpr int64_t kOperations = 16 * 64 * 2;  // of one iteration: 16 registers of 64 products and as many sums

bool dot_products() {
#if defined(__AVX512VNNI__)
  __asm__ volatile(
      "mov %0, %%rax\n"
      "1:\n"
      "vpdpbusd %%zmm31, %%zmm30, %%zmm0\n vpdpbusd %%zmm31, %%zmm30, %%zmm1\n"
      "vpdpbusd %%zmm31, %%zmm30, %%zmm2\n vpdpbusd %%zmm31, %%zmm30, %%zmm3\n"
      "vpdpbusd %%zmm31, %%zmm30, %%zmm4\n vpdpbusd %%zmm31, %%zmm30, %%zmm5\n"
      "vpdpbusd %%zmm31, %%zmm30, %%zmm6\n vpdpbusd %%zmm31, %%zmm30, %%zmm7\n"
      "vpdpbusd %%zmm31, %%zmm30, %%zmm8\n vpdpbusd %%zmm31, %%zmm30, %%zmm9\n"
      "vpdpbusd %%zmm31, %%zmm30, %%zmm10\n vpdpbusd %%zmm31, %%zmm30, %%zmm11\n"
      "vpdpbusd %%zmm31, %%zmm30, %%zmm12\n vpdpbusd %%zmm31, %%zmm30, %%zmm13\n"
      "vpdpbusd %%zmm31, %%zmm30, %%zmm14\n vpdpbusd %%zmm31, %%zmm30, %%zmm15\n"
      "dec %%rax\n"
      "jnz 1b\n"
      :
      : "r"(kIterations)
      : "rax", "cc", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11",
        "xmm12", "xmm13", "xmm14", "xmm15", "xmm30", "xmm31");
  return true;
#else
  return false;
#endif
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) return 2;
  const int threads = std::atoi(argv[1]);
  const double seconds = std::atof(argv[3]);
  const size_t each = (static_cast<size_t>(std::atoi(argv[2])) << 20) / static_cast<size_t>(threads) / 64 * 8;
  // In huge pages, as the machine reads fastest.
  constexpr size_t kHugePage = size_t{2} << 20;
  const size_t bytes = (each * static_cast<size_t>(threads) * sizeof(uint64_t) + kHugePage - 1) / kHugePage * kHugePage;
  const std::unique_ptr<uint64_t, decltype(&std::free)> memory(static_cast<uint64_t*>(std::aligned_alloc(kHugePage, bytes)), &std::free);
  (void)madvise(memory.get(), bytes, MADV_HUGEPAGE);
  uint64_t* const data = memory.get();
  std::fill_n(data, bytes / sizeof(uint64_t), uint64_t{1});
  std::vector<uint64_t> sink(static_cast<size_t>(threads) * 8);  // a line each
  const double read = best_seconds(threads, seconds, [&](int t) {
    sink[static_cast<size_t>(t) * 8] = sum(data + static_cast<size_t>(t) * each, each);
  });
  if (sink[0] != each) return 1;
  const double products = dot_products() ? best_seconds(threads, seconds, [](int) { dot_products(); }) : 0.0;
  const double operations = static_cast<double>(kOperations) * kIterations * threads;
  std::printf("%.6g %.6g\n", static_cast<double>(each * sizeof(uint64_t)) * threads / read, products > 0 ? operations / products : 0.0);
}
