#include "platform/thread_pool.h"

#include <pthread.h>
#include <sched.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <fstream>
#include <sstream>
#include <stdexcept>
#include <string_view>

#include "platform/float_environment.h"
#include "platform/isa.h"

namespace tokenmill {
namespace {

using Clock = std::chrono::steady_clock;

// After that, sleeping costs less than it saves. The caller waits longer: its workers are known to be at work.
constexpr auto kWorkerSpin = std::chrono::microseconds(50);
constexpr auto kCallerSpin = std::chrono::microseconds(200);
// `pause` takes from 4 to 60 ns, reading the clock 25.
constexpr int kPausesPerLook = 32;

inline void cpu_relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

// Spins until done() or the time is up, with wait() in between; returns done().
template <class Done, class Wait>
bool spin(Clock::duration limit, const Done& done, const Wait& wait) {
  for (int i = 0; i < kPausesPerLook; ++i) {
    if (done()) return true;
    wait();
  }
  const Clock::time_point end = Clock::now() + limit;
  do {
    for (int i = 0; i < kPausesPerLook; ++i) {
      if (done()) return true;
      wait();
    }
  } while (Clock::now() < end);
  return done();
}

// Counts the forks between the first process and this one.
std::atomic<int> forks{0};

int fork_count() {
  static const int registered = pthread_atfork(nullptr, nullptr, [] { forks.fetch_add(1, std::memory_order_relaxed); });
  (void)registered;
  return forks.load(std::memory_order_relaxed);
}

// cpu.max of one v2 group: "max 100000" or "150000 100000".
double quota_v2(const std::string& directory) {
  std::ifstream file(directory + "/cpu.max");
  std::string quota;
  double period = 0;
  if (!(file >> quota >> period) || quota == "max" || period <= 0) return INFINITY;
  return std::strtod(quota.c_str(), nullptr) / period;
}

double quota_v1(const std::string& directory) {
  std::ifstream quota_file(directory + "/cpu.cfs_quota_us"), period_file(directory + "/cpu.cfs_period_us");
  double quota = -1, period = 0;
  if (!(quota_file >> quota) || !(period_file >> period) || quota <= 0 || period <= 0) return INFINITY;
  return quota / period;
}

// The minimum over `path` and its ancestors below `root`, and the root itself, which is all that a container sees.
template <class Quota>
double tightest(const std::string& root, std::string path, const Quota& quota) {
  double least = INFINITY;
  for (;;) {
    while (!path.empty() && path.back() == '/') path.pop_back();
    least = std::min(least, quota(root + path));
    if (path.empty()) return least;
    path.resize(std::min(path.rfind('/'), path.size()));
    if (path.find('/') == std::string::npos) path.clear();
  }
}

bool lists_cpu(const std::string& controllers) {
  std::istringstream names(controllers);
  for (std::string name; std::getline(names, name, ',');) {
    if (name == "cpu") return true;
  }
  return false;
}

// CPUs of the affinity mask, ascending.
std::vector<int> affinity() {
  cpu_set_t mask;
  CPU_ZERO(&mask);
  std::vector<int> cpus;
  if (sched_getaffinity(0, sizeof(mask), &mask) != 0) return cpus;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (CPU_ISSET(cpu, &mask)) cpus.push_back(cpu);
  }
  return cpus;
}

int pool_size(int threads) {
  if (threads < 0) throw std::invalid_argument("threads must be 0 (all usable) or positive");
  return threads == 0 ? usable_cpu_count() : threads;
}

}  // namespace

double cgroup_cpu_quota(const std::string& membership, const std::string& mount) {
  // Lines are "hierarchy:controllers:path"; hierarchy 0 without controllers is version 2.
  double least = INFINITY;
  std::ifstream file(membership);
  for (std::string line; std::getline(file, line);) {
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1), path = line.substr(second + 1);
    if (controllers.empty()) {
      least = std::min(least, tightest(mount, path, quota_v2));
      least = std::min(least, tightest(mount + "/unified", path, quota_v2));  // beside version 1
    } else if (lists_cpu(controllers)) {
      least = std::min(least, tightest(mount + "/" + controllers, path, quota_v1));
      least = std::min(least, tightest(mount + "/cpu", path, quota_v1));
    }
  }
  return least;
}

int usable_cpu_count() {
  const size_t allowed = affinity().size();
  int count = allowed != 0 ? static_cast<int>(allowed) : static_cast<int>(std::thread::hardware_concurrency());
  const double quota = cgroup_cpu_quota("/proc/self/cgroup", "/sys/fs/cgroup");
  if (std::isfinite(quota)) count = std::min(count, static_cast<int>(std::ceil(quota)));
  return std::max(count, 1);
}

ThreadPool::ThreadPool(int threads)
    : size_(pool_size(threads)), birth_(fork_count()), shares_(static_cast<size_t>(size_)) {
  active_isa();  // jobs must not throw: a TOKENMILL_ISA that this processor cannot run is refused here
  workers_.reserve(static_cast<size_t>(size_ - 1));
  for (int index = 1; index < size_; ++index) workers_.emplace_back([this, index] { worker(index); });
  pin_workers();
}

ThreadPool::~ThreadPool() {
  if (fork_count() != birth_) {
    // The threads belong to the parent; joining or detaching them here is undefined, so their handles are left alone.
    new std::vector<std::thread>(std::move(workers_));
    return;
  }
  stopping_.store(true, std::memory_order_relaxed);
  generation_.fetch_add(1, std::memory_order_seq_cst);
  generation_.notify_all();
  for (std::thread& thread : workers_) thread.join();
}

void ThreadPool::pin_workers() {
  const char* wish = std::getenv("TOKENMILL_PIN");
  const std::vector<int> cpus = affinity();
  if ((wish != nullptr && std::string_view(wish) == "0") || size_ < 2 || cpus.size() != static_cast<size_t>(size_)) return;
  free_cpu_ = cpus[0];
  worker_cpus_.assign(cpus.begin() + 1, cpus.end());
  pinned_ = true;
  for (size_t i = 0; i < workers_.size(); ++i) pinned_ = pin(i) && pinned_;
}

bool ThreadPool::pin(size_t worker) {
  cpu_set_t mask;
  CPU_ZERO(&mask);
  CPU_SET(worker_cpus_[worker], &mask);
  return pthread_setaffinity_np(workers_[worker].native_handle(), sizeof(mask), &mask) == 0;
}

void ThreadPool::make_way(int cpu) {
  const auto taken = std::find(worker_cpus_.begin(), worker_cpus_.end(), cpu);
  if (taken == worker_cpus_.end()) return;  // the caller has left the CPUs that the pool knows
  std::swap(*taken, free_cpu_);
  pinned_ = pin(static_cast<size_t>(taken - worker_cpus_.begin())) && pinned_;
}

void ThreadPool::Reader::follow(const Stretch* stretches, int index) {
  if (stretches == named) return;
  named = stretches;
  at = end = nullptr;
  if (stretches == nullptr) return;
  at = stretches[index].begin;
  end = at + stretches[index].bytes;
}

void ThreadPool::Reader::wait() {
  if (at == end) return cpu_relax();
  constexpr int kLines = 4;  // few, so that a fork is seen soon
  for (int line = 0; line < kLines && at != end; ++line, at += 64) __builtin_prefetch(at, 0, 2);  // second-level cache
}

void ThreadPool::run_raw(RawJob job, const void* context) {
  times_ == nullptr ? fork(job, context) : run_timed(job, context);
}

void ThreadPool::run_timed(RawJob job, const void* context) {
  using Seconds = std::chrono::duration<double>;
  struct alignas(64) Worked {
    double seconds = 0;
  };
  struct Timed {
    RawJob job;
    const void* context;
    std::thread::id caller;
    std::vector<Worked> worked;  // by thread; what the caller takes over counts as its own
  };
  Timed timed{job, context, std::this_thread::get_id(), std::vector<Worked>(static_cast<size_t>(size_))};
  const auto timed_job = [](const void* raw, int index, int count) {
    Timed& of = *const_cast<Timed*>(static_cast<const Timed*>(raw));
    const Clock::time_point begin = Clock::now();
    of.job(of.context, index, count);
    const size_t thread = std::this_thread::get_id() == of.caller ? 0 : static_cast<size_t>(index);
    of.worked[thread].seconds += Seconds(Clock::now() - begin).count();
  };
  const Clock::time_point begin = Clock::now();
  fork(timed_job, &timed);
  const double whole = Seconds(Clock::now() - begin).count();
  double longest = 0, all = 0;
  for (const Worked& worked : timed.worked) {
    longest = std::max(longest, worked.seconds);
    all += worked.seconds;
  }
  ++times_->forks;
  times_->joining += whole - longest;
  times_->waiting += whole * size_ - all;
}

void ThreadPool::fork(RawJob job, const void* context) {
  const FloatEnvironment environment;
  if (size_ == 1 || forks.load(std::memory_order_relaxed) != birth_) {
    job(context, 0, 1);
    return;
  }
  if (pinned_) {
    if (const int cpu = sched_getcpu(); cpu != free_cpu_) make_way(cpu);
  }
  job_ = job;
  context_ = context;
  remaining_.store(static_cast<uint32_t>(size_ - 1), std::memory_order_relaxed);
  const uint32_t generation = generation_.fetch_add(1, std::memory_order_seq_cst) + 1;
  // A worker announces itself as a sleeper before it looks at the generation a last time, so either it sees the new
  // generation or this thread sees the sleeper.
  if (sleepers_.load(std::memory_order_seq_cst) != 0) generation_.notify_all();
  job(context, 0, size_);
  uint32_t taken = 0;
  for (int index = 1; index < size_; ++index) {
    if (!shares_[static_cast<size_t>(index)].claim(generation)) continue;
    job(context, index, size_);
    ++taken;
  }
  if (remaining_.fetch_sub(taken, std::memory_order_acq_rel) == taken) return;
  const auto joined = [this] { return remaining_.load(std::memory_order_acquire) == 0; };
  caller_reader_.follow(ahead_, 0);
  if (spin(kCallerSpin, joined, [this] { caller_reader_.wait(); })) return;
  for (uint32_t left; (left = remaining_.load(std::memory_order_acquire)) != 0;) {
    remaining_.wait(left, std::memory_order_acquire);
  }
}

void ThreadPool::worker(int index) {
  const FloatEnvironment environment;
  Share& share = shares_[static_cast<size_t>(index)];
  Reader reader;
  const auto wait = [&] { reader.wait(); };
  for (uint32_t seen = 0;;) {
    const auto called = [&] { return generation_.load(std::memory_order_acquire) != seen; };
    while (!spin(kWorkerSpin, called, wait)) {
      sleepers_.fetch_add(1, std::memory_order_seq_cst);
      generation_.wait(seen, std::memory_order_seq_cst);
      sleepers_.fetch_sub(1, std::memory_order_seq_cst);
    }
    if (stopping_.load(std::memory_order_relaxed)) return;
    // Once the share is claimed the caller waits for it, so that job and context belong to this generation.
    seen = generation_.load(std::memory_order_acquire);
    if (!share.claim(seen)) continue;
    const Stretch* ahead = ahead_;
    job_(context_, index, size_);
    reader.follow(ahead, index);
    // The caller may be waiting in the kernel; notify_one is a load and a branch when nobody is.
    if (remaining_.fetch_sub(1, std::memory_order_acq_rel) == 1) remaining_.notify_one();
  }
}

}  // namespace tokenmill
