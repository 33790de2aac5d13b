// Binds the thread pool, and for its tests how often each thread ran, and in which floating-point environment.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <atomic>
#include <thread>
#include <vector>

#include "platform/thread_pool.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace tokenmill;

namespace {

// Padded, so that counting does not bounce one cache line between threads.
struct alignas(64) Counter {
  int64_t value = 0;
};

std::vector<int64_t> fork_join(ThreadPool& pool, int64_t times) {
  std::vector<Counter> counters(static_cast<size_t>(pool.size()));
  const nb::gil_scoped_release release;
  for (int64_t i = 0; i < times; ++i) {
    pool.run([&](int index, int) { ++counters[static_cast<size_t>(index)].value; });
  }
  std::vector<int64_t> result;
  for (const Counter& counter : counters) result.push_back(counter.value);
  return result;
}

// Per thread: does a subnormal survive, and does 1 + 2^-24 round to even (downwards)?
std::vector<bool> default_environment(ThreadPool& pool) {
  std::vector<Counter> ok(static_cast<size_t>(pool.size()));
  std::atomic<int> started{0};
  pool.run([&](int index, int count) {
    // Holds every thread until all have a share, or the caller would take over those of late workers.
    started.fetch_add(1);
    while (started.load() < count) std::this_thread::yield();
    volatile float tiny = 0x1p-126f, half = 0.5f, one = 1.0f, ulp_half = 0x1p-24f, three_halves = 0x1.8p-23f;
    const float subnormal = tiny * half;
    const float down = one + ulp_half, up = one + three_halves;
    ok[static_cast<size_t>(index)].value = subnormal != 0.0f && subnormal * 2.0f == 0x1p-126f && down == 1.0f && up == 1.0f + 0x1p-22f;
  });
  std::vector<bool> result;
  for (const Counter& counter : ok) result.push_back(counter.value != 0);
  return result;
}

}  // namespace

void bind_thread_pool(nb::module_& m) {
  m.def("cgroup_cpu_quota", &cgroup_cpu_quota, "membership"_a, "mount"_a,
        "CPU quota, in CPUs, that /proc/self/cgroup and the cgroup mount at these places grant; inf if none.");
  nb::class_<ThreadPool>(m, "ThreadPool", "The threads that executor and sampler run on; one caller at a time.")
      .def(nb::init<int>(), "threads"_a)
      .def_prop_ro("size", &ThreadPool::size)
      .def_prop_ro("pinned", &ThreadPool::pinned, "Whether every worker is bound to a core of its own.")
      .def("fork_join", &fork_join, "times"_a, "Runs an empty job `times` times; returns how often each share of it ran.")
      .def("default_environment", &default_environment,
           "Per thread, whether rounding is to nearest even and subnormals are kept.");
}
