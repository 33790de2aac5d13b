#include "kernels/roofline.h"

#include <nanobind/nanobind.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <memory>
#include <new>

#include "platform/thread_pool.h"

namespace nb = nanobind;

using namespace tokenmill;

namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

// Best of `rounds` runs: other tenants of the machine only ever make a run slower.
template <class Job>
double best_seconds(ThreadPool& pool, int rounds, const Job& job) {
  std::atomic<int64_t> sink{0};
  double best = 1e300;
  for (int round = 0; round < rounds; ++round) {
    const auto start = Clock::now();
    pool.run([&](int index, int count) { sink.fetch_add(job(index, count), std::memory_order_relaxed); });
    best = std::min(best, seconds_since(start));
  }
  return best;
}

double read_bytes_per_second(size_t bytes, int threads, double seconds) {
  ThreadPool pool(threads);
  const size_t each = bytes / static_cast<size_t>(pool.size()) / 1024 * 1024;
  if (each == 0) throw nb::value_error("the working set must be at least 1 KiB a thread");
  const size_t total = each * static_cast<size_t>(pool.size());
  // 4 KiB more than is read: the loop prefetches past its end.
  const std::unique_ptr<uint8_t[]> data(new uint8_t[total + 4096]);
  std::fill_n(data.get(), total + 4096, uint8_t{1});
  const RooflineKernels& kernels = roofline_kernels();
  const auto repeats = std::max<size_t>(1, (size_t{256} << 20) / total);  // small sets many times, so that timing holds
  const auto job = [&](int index, int) {
    int64_t sum = 0;
    for (size_t r = 0; r < repeats; ++r) sum += kernels.read(data.get() + static_cast<size_t>(index) * each, each);
    return sum;
  };
  const double once = best_seconds(pool, 1, job);
  const int rounds = std::max(3, static_cast<int>(seconds / once));
  return static_cast<double>(total) * static_cast<double>(repeats) / best_seconds(pool, rounds, job);
}

template <class Kernel>
double operations_per_second(Kernel kernel, int64_t operations, int threads, double seconds) {
  ThreadPool pool(threads);
  int64_t iterations = 1000;
  const auto job = [&](int, int) { return static_cast<int64_t>(kernel(iterations)); };
  while (best_seconds(pool, 1, job) < 0.01) iterations *= 4;
  const int rounds = std::max(5, static_cast<int>(seconds / best_seconds(pool, 1, job)));
  const double best = best_seconds(pool, rounds, job);
  return static_cast<double>(operations) * static_cast<double>(iterations) * pool.size() / best;
}

}  // namespace

void bind_roofline(nb::module_& m) {
  using nb::literals::operator""_a;
  m.def("read_bytes_per_second", &read_bytes_per_second, "bytes"_a, "threads"_a = 0, "seconds"_a = 0.3,
        nb::call_guard<nb::gil_scoped_release>(), "Best streaming read rate over a working set of `bytes`.");
  m.def("int8_operations_per_second", [](int threads, double seconds) {
    return operations_per_second(roofline_kernels().dot_int8, roofline_kernels().int8_operations, threads, seconds);
  }, "threads"_a = 0, "seconds"_a = 0.3, nb::call_guard<nb::gil_scoped_release>(),
        "Best rate of int8 multiply and add operations of the path in use, from registers.");
  m.def("f32_operations_per_second", [](int threads, double seconds) {
    return operations_per_second(roofline_kernels().fma_f32, roofline_kernels().f32_operations, threads, seconds);
  }, "threads"_a = 0, "seconds"_a = 0.3, nb::call_guard<nb::gil_scoped_release>(),
        "Best rate of fp32 multiply and add operations of the path in use, from registers.");
}
