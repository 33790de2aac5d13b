// The thread pool without kernels: every share of every fork runs exactly once, whether workers spin, sleep or are late.
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

}  // namespace

int main() {
  Checks checks;
  for (int threads : {1, 2, 3, 5}) {
    forks(checks, threads, 5000, std::chrono::microseconds(0));
    forks(checks, threads, 50, std::chrono::microseconds(200));  // past the workers' spin: they sleep
    forks(checks, threads, 200, std::chrono::microseconds(45));  // about when they fall asleep
  }
  for (int i = 0; i < 50; ++i) ThreadPool unused(3);  // made and destroyed without a fork
  checks.expect(true, "");
  return checks.finish();
}
