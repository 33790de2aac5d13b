// The thread pool without kernels: every share of every fork runs exactly once, whether workers spin, sleep or are late.
#include <sched.h>

#include <chrono>
#include <thread>

#include "check.h"
#include "platform/thread_pool.h"

using namespace tokenmill;

namespace {

// Plain counters: a share that ran twice or overlapped with the join is a data race that the thread sanitizer reports.
void forks(Checks& checks, int threads, int count, std::chrono::microseconds pause) {
  ThreadPool pool(threads);
  std::vector<int64_t> runs(static_cast<size_t>(threads));
  bool complete = true;
  for (int fork = 1; fork <= count; ++fork) {
    pool.run([&](int index, int shares) { runs[static_cast<size_t>(index)] += shares == threads ? 1 : 1000; });
    for (int64_t value : runs) complete = complete && value == fork;
    if (pause.count() > 0) std::this_thread::sleep_for(pause);
  }
  checks.expect(complete, std::to_string(count) + " forks of " + std::to_string(threads) + " threads");
}

// Reading ahead changes nothing but what waiting threads do, wherever the stretches lie and however they alternate.
void reads_ahead(Checks& checks, int threads) {
  ThreadPool pool(threads);
  const std::vector<uint8_t> memory(1 << 20);
  const std::vector<ThreadPool::Stretch> all(static_cast<size_t>(threads), {memory.data(), memory.size()});
  const std::vector<ThreadPool::Stretch> nothing(static_cast<size_t>(threads));
  const ThreadPool::Stretch* const named[] = {all.data(), nothing.data(), nullptr};
  std::vector<int> runs(static_cast<size_t>(threads));
  for (int fork = 0; fork < 3000; ++fork) {
    pool.read_ahead(named[fork / 2 % 3]);
    pool.run([&](int index, int) { ++runs[static_cast<size_t>(index)]; });
  }
  bool complete = true;
  for (int value : runs) complete = complete && value == 3000;
  checks.expect(complete, "forks of " + std::to_string(threads) + " threads that read ahead");
}

// Times of forks: counted while they are asked for, and what one thread waits for another is seen.
void times_forks(Checks& checks) {
  ThreadPool pool(2);
  ThreadPool::ForkTimes times;
  const auto work = [](int index, int) {
    const auto end = std::chrono::steady_clock::now() + std::chrono::microseconds(index == 0 ? 400 : 100);
    while (std::chrono::steady_clock::now() < end) {
    }
  };
  pool.run(work);
  pool.time_forks(&times);
  for (int fork = 0; fork < 20; ++fork) pool.run(work);
  pool.time_forks(nullptr);
  pool.run(work);
  checks.expect(times.forks == 20, "20 forks are timed");
  // Whoever runs the shares, one thread is without work for most of each fork; neighbours may take some of it.
  checks.expect(times.joining >= 0 && times.joining <= times.waiting, "joining is a part of waiting");
  checks.expect(times.waiting >= 20 * 100e-6, "a thread waits for the other");
}

// A caller that the kernel has put on a worker's CPU must not stay alone there: the worker makes way.
void avoids_the_caller(Checks& checks) {
  ThreadPool pool(0);
  if (!pool.pinned()) return;  // one CPU, a quota or TOKENMILL_PIN=0
  cpu_set_t all;
  sched_getaffinity(0, sizeof(all), &all);
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (!CPU_ISSET(cpu, &all)) continue;
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(cpu, &one);
    sched_setaffinity(0, sizeof(one), &one);
    bool elsewhere = false;
    for (int fork = 0; fork < 500 && !elsewhere; ++fork) {
      std::vector<int> seen(static_cast<size_t>(pool.size()));
      pool.run([&](int index, int) {
        seen[static_cast<size_t>(index)] = sched_getcpu();
        const auto end = std::chrono::steady_clock::now() + std::chrono::microseconds(300);
        while (index == 0 && std::chrono::steady_clock::now() < end) {
        }
      });
      for (int seen_cpu : seen) elsewhere = elsewhere || seen_cpu != cpu;
    }
    checks.expect(elsewhere, "workers run beside a caller on CPU " + std::to_string(cpu));
  }
  sched_setaffinity(0, sizeof(all), &all);
}

}  // namespace

int main() {
  Checks checks;
  for (int threads : {1, 2, 3, 5}) {
    forks(checks, threads, 5000, std::chrono::microseconds(0));
    reads_ahead(checks, threads);
    forks(checks, threads, 50, std::chrono::microseconds(200));  // past the workers' spin: they sleep
    forks(checks, threads, 200, std::chrono::microseconds(45));  // about when they fall asleep
  }
  for (int i = 0; i < 50; ++i) ThreadPool unused(3);  // made and destroyed without a fork
  checks.expect(true, "");
  times_forks(checks);
  avoids_the_caller(checks);
  return checks.finish();
}
