#include "platform/thread_pool.h"

#include <sched.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <stdexcept>
#include <string>

#include "platform/float_environment.h"

namespace tokenmill {
namespace {

constexpr int kSpins = 2000;  // about 50 us of `pause`, after which sleeping costs less than it saves

inline void cpu_relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

// The cgroup's quota in CPUs, or infinity. A container sees its own group at the mount's root.
double cgroup_cpu_quota() {
  if (std::ifstream v2("/sys/fs/cgroup/cpu.max"); v2) {
    std::string quota;
    double period = 0;
    if (v2 >> quota >> period && quota != "max" && period > 0) return std::stod(quota) / period;
  }
  std::ifstream quota_file("/sys/fs/cgroup/cpu/cpu.cfs_quota_us"), period_file("/sys/fs/cgroup/cpu/cpu.cfs_period_us");
  double quota = -1, period = 0;
  if (quota_file >> quota && period_file >> period && quota > 0 && period > 0) return quota / period;
  return INFINITY;
}

}  // namespace

int usable_cpu_count() {
  int count = static_cast<int>(std::thread::hardware_concurrency());
  cpu_set_t mask;
  CPU_ZERO(&mask);
  if (sched_getaffinity(0, sizeof(mask), &mask) == 0) count = CPU_COUNT(&mask);
  const double quota = cgroup_cpu_quota();
  if (std::isfinite(quota)) count = std::min(count, static_cast<int>(std::ceil(quota)));
  return std::max(count, 1);
}

ThreadPool::ThreadPool(int threads) : size_(threads == 0 ? usable_cpu_count() : threads) {
  if (threads < 0) throw std::invalid_argument("threads must be 0 (all usable) or positive");
  workers_.reserve(static_cast<size_t>(size_ - 1));
  for (int index = 1; index < size_; ++index) workers_.emplace_back([this, index] { worker(index); });
}

ThreadPool::~ThreadPool() {
  stopping_.store(true, std::memory_order_relaxed);
  generation_.fetch_add(1, std::memory_order_seq_cst);
  generation_.notify_all();
  for (std::thread& thread : workers_) thread.join();
}

void ThreadPool::run_raw(RawJob job, const void* context) {
  const FloatEnvironment environment;
  if (size_ == 1) {
    job(context, 0, 1);
    return;
  }
  job_ = job;
  context_ = context;
  remaining_.store(static_cast<uint32_t>(size_ - 1), std::memory_order_relaxed);
  generation_.fetch_add(1, std::memory_order_seq_cst);
  // A worker announces itself as a sleeper before it looks at the generation a last time, so either it sees the new
  // generation or this thread sees the sleeper.
  if (sleepers_.load(std::memory_order_seq_cst) != 0) generation_.notify_all();
  job(context, 0, size_);
  for (int spins = 0; remaining_.load(std::memory_order_acquire) != 0; ++spins) {
    if (spins < 4 * kSpins) {
      cpu_relax();
    } else {
      const uint32_t left = remaining_.load(std::memory_order_acquire);
      if (left != 0) remaining_.wait(left, std::memory_order_acquire);
    }
  }
}

void ThreadPool::worker(int index) {
  const FloatEnvironment environment;
  uint32_t seen = 0;
  for (;;) {
    int spins = 0;
    while (generation_.load(std::memory_order_acquire) == seen) {
      if (++spins < kSpins) {
        cpu_relax();
        continue;
      }
      sleepers_.fetch_add(1, std::memory_order_seq_cst);
      generation_.wait(seen, std::memory_order_seq_cst);
      sleepers_.fetch_sub(1, std::memory_order_seq_cst);
    }
    ++seen;
    if (stopping_.load(std::memory_order_relaxed)) return;
    job_(context_, index, size_);
    // The caller may be waiting in the kernel; notify_one is a load and a branch when nobody is.
    if (remaining_.fetch_sub(1, std::memory_order_acq_rel) == 1) remaining_.notify_one();
  }
}

}  // namespace tokenmill
