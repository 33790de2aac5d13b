#include "kernels/roofline.h"

#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <atomic>
#include <chrono>
#include <memory>
#include <new>
#include <optional>

#include "platform/mapping.h"
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
  // 4 KiB more than is read: the loop prefetches past its end. In huge pages, as far as the kernel gives them: ordinary
  // pages read up to a sixth slower, and weights and KV lie in huge ones.
  const Mapping data(total + 4096);
  std::fill_n(data.data(), total + 4096, uint8_t{1});
  const RooflineKernels& kernels = roofline_kernels();
  const auto repeats = std::max<size_t>(1, (size_t{256} << 20) / total);  // small sets many times, so that timing holds
  const auto job = [&](int index, int) {
    int64_t sum = 0;
    for (size_t r = 0; r < repeats; ++r) sum += kernels.read(data.data() + static_cast<size_t>(index) * each, each);
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

#if defined(__x86_64__)
constexpr int64_t kBf16Operations = 12 * 64;  // of one iteration: 12 chains of 16 lanes, two products and two sums each

// The instruction that 16-bit weights would run at best. Twelve named accumulators, as in per_isa/roofline.cpp.
__attribute__((target("avx512f,avx512bf16"))) float dot_bf16(int64_t iterations) {
  // 0.5 and 1.0: products that stay finite for as long as anybody measures.
  __m512bh w = reinterpret_cast<__m512bh>(_mm512_set1_epi32(0x3f003f80));
  __m512 a = _mm512_set1_ps(0.1f), b = _mm512_set1_ps(0.2f), c = _mm512_set1_ps(0.3f), d = _mm512_set1_ps(0.4f);
  __m512 e = _mm512_set1_ps(0.5f), f = _mm512_set1_ps(0.6f), g = _mm512_set1_ps(0.7f), h = _mm512_set1_ps(0.8f);
  __m512 i = _mm512_set1_ps(0.9f), j = _mm512_set1_ps(1.1f), k = _mm512_set1_ps(1.2f), l = _mm512_set1_ps(1.3f);
  for (int64_t n = 0; n < iterations; ++n) {
    __asm__ volatile("" : "+v"(w));
    a = _mm512_dpbf16_ps(a, w, w);
    b = _mm512_dpbf16_ps(b, w, w);
    c = _mm512_dpbf16_ps(c, w, w);
    d = _mm512_dpbf16_ps(d, w, w);
    e = _mm512_dpbf16_ps(e, w, w);
    f = _mm512_dpbf16_ps(f, w, w);
    g = _mm512_dpbf16_ps(g, w, w);
    h = _mm512_dpbf16_ps(h, w, w);
    i = _mm512_dpbf16_ps(i, w, w);
    j = _mm512_dpbf16_ps(j, w, w);
    k = _mm512_dpbf16_ps(k, w, w);
    l = _mm512_dpbf16_ps(l, w, w);
  }
  const __m512 sum = a + b + c + d + e + f + g + h + i + j + k + l;
  return sum[0] + sum[15];
}
#endif

// Nothing where the processor has no bf16 dot product.
std::optional<double> bf16_operations_per_second([[maybe_unused]] int threads, [[maybe_unused]] double seconds) {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512bf16")) return operations_per_second(dot_bf16, kBf16Operations, threads, seconds);
#endif
  return std::nullopt;
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
  m.def("bf16_operations_per_second", &bf16_operations_per_second, "threads"_a = 0, "seconds"_a = 0.3,
        nb::call_guard<nb::gil_scoped_release>(),
        "Best rate of bf16 multiply and add operations, from registers; None if the processor has no such instruction.");
}
