// What the native benchmarks share: memory to work on, medians, and the machine's limits, measured beside every sample
// because those of a virtual machine move while one looks.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "kernels/roofline.h"
#include "platform/mapping.h"
#include "platform/thread_pool.h"

namespace tokenmill::limits {

inline constexpr size_t kReadBytes = size_t{96} << 20;

struct AlignedFree {
  void operator()(void* p) const { std::free(p); }
};
using AlignedBytes = std::unique_ptr<uint8_t[], AlignedFree>;

// Every fp16 and fp32 among these bytes is a small normal number.
inline void fill(uint8_t* data, size_t bytes) {
  uint32_t state = 1;
  for (size_t i = 0; i < bytes; ++i) data[i] = static_cast<uint8_t>(0x20 | ((state = state * 1664525 + 1013904223) >> 28));
}

inline AlignedBytes aligned_bytes(size_t bytes) {
  AlignedBytes data(static_cast<uint8_t*>(std::aligned_alloc(64, (bytes + 8191) / 64 * 64)));
  fill(data.get(), bytes + 4096);
  return data;
}

inline double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

inline double median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + static_cast<ptrdiff_t>(values.size() / 2), values.end());
  return values[values.size() / 2];
}

struct Limits {
  double bytes, operations;  // per second
};

// The limits of a pool's threads; operations are int8 dot products or fp32 fma.
class Machine {
 public:
  Machine(ThreadPool& pool, bool integer) : pool_(pool), integer_(integer), data_(kReadBytes) {
    std::memset(data_.data(), 0x2c, data_.bytes());
    while (timed_operations() < 0.003) iterations_ *= 2;
  }

  Limits measure() {
    const size_t each = kReadBytes / static_cast<size_t>(pool_.size()) / 1024 * 1024;
    const double start = now();
    pool_.run([&](int index, int) { sink_ = roofline_kernels().read(data_.data() + static_cast<size_t>(index) * each, each); });
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
  Mapping data_;  // huge pages where the system has them: without, reading is a sixth slower
  int64_t iterations_ = 1000;
  volatile int32_t sink_ = 0;
};

}  // namespace tokenmill::limits
