// Runs a computation on every instruction-set path that this processor has, and compares bytes with the portable path.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "platform/float_environment.h"
#include "platform/isa.h"

struct AlignedDelete {
  void operator()(uint8_t* p) const { ::operator delete(p, std::align_val_t{64}); }
};
using AlignedBytes = std::unique_ptr<uint8_t[], AlignedDelete>;

// Exactly this many bytes, so that an address sanitizer sees any access past the end, and all 0xff, which are NaN as
// floats: stale memory must not reach a result.
inline AlignedBytes aligned_bytes(size_t bytes) {
  AlignedBytes p(static_cast<uint8_t*>(::operator new(bytes, std::align_val_t{64})));
  std::memset(p.get(), 0xff, bytes);
  return p;
}

inline std::vector<float> normal_floats(size_t count, std::mt19937& random, float spread = 1.0f) {
  std::normal_distribution<float> normal(0.0f, spread);
  std::vector<float> out(count);
  for (float& value : out) value = normal(random);
  return out;
}

// Appends the bytes of a result.
template <class Element>
void append(std::vector<uint8_t>& bytes, const std::vector<Element>& values) {
  const uint8_t* begin = reinterpret_cast<const uint8_t*>(values.data());
  bytes.insert(bytes.end(), begin, begin + values.size() * sizeof(Element));
}

// compute() -> std::vector<uint8_t>, the same on all paths. Leaves the portable path active.
template <class Compute>
void expect_same_on_all_paths(Checks& checks, const std::string& what, const Compute& compute) {
  using namespace tokenmill;
  const FloatEnvironment environment;
  set_active_isa(Isa::kPortable);
  const std::vector<uint8_t> want = compute();
  checks.expect(!want.empty(), what + " computed nothing");
  for (int i = 1; i < kIsaCount; ++i) {
    const Isa isa = static_cast<Isa>(i);
    if (!isa_available(isa)) continue;
    set_active_isa(isa);
    checks.expect(compute() == want, what + " on " + std::string(isa_name(isa)));
  }
  set_active_isa(Isa::kPortable);
}

// Says which paths a passed test has seen.
inline void print_paths() {
  using namespace tokenmill;
  std::printf("paths:");
  for (int i = 0; i < kIsaCount; ++i) {
    if (isa_available(static_cast<Isa>(i))) std::printf(" %s", std::string(isa_name(static_cast<Isa>(i))).c_str());
  }
  std::printf("\n");
}
