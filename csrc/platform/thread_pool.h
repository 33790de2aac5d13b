// A pool of worker threads for one engine: fork, run the same job on every thread, join.
//
// Measured reasons for its shape: a fork and join costs 0.13 us while spinning and 50 us through a futex, and long
// spins beside a competing process are catastrophic; so workers spin for about 50 us and then sleep.
//
// Late workers: a fork hands out one share per thread. A worker claims its share when it arrives; the caller, done with
// its own, takes over every share that nobody has claimed. So a worker that sleeps, or that another process keeps from
// running, delays nobody; the caller waits only for shares that are being worked on.
//
// Pinning: if the affinity mask holds exactly as many CPUs as the pool has threads, each worker is bound to one of
// them; TOKENMILL_PIN=0 forbids it. The calling thread is never bound: it is the application's. Where it is found on a
// worker's CPU, that worker moves to the one left free: the kernel does not move a running thread away from a worker
// that mostly sleeps, and the pool would run on one CPU for good.
//
// Reading ahead: the pool can be told what each thread will read next, and threads that wait bring it into their caches.
// Waiting is most of what a worker does while the caller normalizes one row or the others finish their shares.
//
// After fork() the child's copy of a pool has no workers. It stays usable: every job then runs on the caller alone,
// as job(0, 1).
#pragma once

#include <atomic>
#include <cstdint>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace tokenmill {

// Threads this process may use: the affinity mask and the cgroup's CPU quota (v1 and v2), at least 1.
int usable_cpu_count();

// The tightest CPU quota, in CPUs, of a process's cgroup and its ancestors, or infinity. `membership` is the process's
// /proc/self/cgroup, `mount` the place of the cgroup file systems (/sys/fs/cgroup).
double cgroup_cpu_quota(const std::string& membership, const std::string& mount);

class ThreadPool {
 public:
  // `threads` counts the calling thread; 0 means usable_cpu_count(). Throws std::invalid_argument below 0.
  explicit ThreadPool(int threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const { return size_; }
  // Whether every worker is bound to a CPU of its own.
  bool pinned() const { return pinned_; }

  // Runs job(index, count) once for every index below the count of threads, the caller's own being 0, and returns when
  // all are done. No two calls of one index overlap, so an index may own scratch memory; indices run at the same time
  // or, where a worker is late, one after the other on the caller, so they must not wait for each other without need.
  // The job must not throw. Not reentrant; one caller at a time. Every thread runs with round-to-nearest and
  // denormals kept (NUMERICS N1), whatever the caller's floating-point environment is; the caller's is restored.
  template <class Job>
  void run(const Job& job) {
    run_raw([](const void* context, int index, int count) { (*static_cast<const Job*>(context))(index, count); }, &job);
  }

  // Memory that a thread will read soon; bytes is a multiple of 64.
  struct Stretch {
    const uint8_t* begin = nullptr;
    size_t bytes = 0;
  };
  // From the next fork on, threads that wait bring `stretches[index]` into their caches instead of pausing, each stretch
  // once, until another array is named or null. The array must stay as it is while it is named.
  void read_ahead(const Stretch* stretches) { ahead_ = stretches; }

  // What forks take beside the work in them, in seconds.
  struct ForkTimes {
    int64_t forks = 0;
    double joining = 0;  // of each fork, its time without that of the thread that worked longest
    double waiting = 0;  // thread-seconds without work, of all threads
  };
  // From the next fork on every fork adds to `times`, until null is named. Costs two looks at the clock a share.
  void time_forks(ForkTimes* times) { times_ = times; }

  // [begin, end) of `items` that thread `index` of `count` owns; contiguous and in order.
  static std::pair<int64_t, int64_t> share(int64_t items, int index, int count) {
    return {items * index / count, items * (index + 1) / count};
  }

 private:
  using RawJob = void (*)(const void*, int, int);
  void run_raw(RawJob job, const void* context);
  void run_timed(RawJob job, const void* context);
  void fork(RawJob job, const void* context);
  void worker(int index);
  void pin_workers();
  bool pin(size_t worker);  // to its CPU; false if the system refuses
  void make_way(int cpu);   // the caller runs on it

  int size_;
  bool pinned_ = false;
  int free_cpu_ = -1;             // of a pinned pool: the one CPU without a worker
  std::vector<int> worker_cpus_;  // likewise, by worker
  const int birth_;  // forks of this process's ancestors when the pool was made
  RawJob job_ = nullptr;
  const void* context_ = nullptr;
  const Stretch* ahead_ = nullptr;
  ForkTimes* times_ = nullptr;
  // How far a thread has come with its stretch.
  struct Reader {
    const Stretch* named = nullptr;
    const uint8_t* at = nullptr;
    const uint8_t* end = nullptr;
    void follow(const Stretch* stretches, int index);
    void wait();  // reads a few lines, or pauses if there is nothing left to read
  };
  Reader caller_reader_;
  // The last generation whose share of worker `index` was claimed; one behind generation_ while it waits for a taker.
  struct alignas(64) Share {
    std::atomic<uint32_t> claimed{0};
    bool claim(uint32_t generation) {
      uint32_t before = generation - 1;
      return claimed.load(std::memory_order_relaxed) == before &&
             claimed.compare_exchange_strong(before, generation, std::memory_order_acq_rel);
    }
  };
  std::vector<Share> shares_;  // [0] is not used
  alignas(64) std::atomic<uint32_t> generation_{0};
  alignas(64) std::atomic<uint32_t> remaining_{0};
  alignas(64) std::atomic<uint32_t> sleepers_{0};
  std::atomic<bool> stopping_{false};
  std::vector<std::thread> workers_;
};

}  // namespace tokenmill
