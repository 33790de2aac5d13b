// The element formats of weight matrices, and the sizes that follow from each.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tokenmill {

// Numbers are ours (the packed layout's), not GGUF's.
enum class WeightFormat : int32_t {
  kF32 = 0, kF16 = 1, kBf16 = 2,
  kQ4_0 = 3, kQ4_1 = 4, kQ5_0 = 5, kQ5_1 = 6, kQ8_0 = 7, kIq4Nl = 8,  // groups of 32
  kQ2K = 9, kQ3K = 10, kQ4K = 11, kQ5K = 12, kQ6K = 13,               // super-blocks of 256
};

// Which activation a format multiplies (NUMERICS N2): kF32, or int8 with one scale per 32 or 256 values of K.
enum class ActivationFormat : int32_t { kF32 = 0, kInt8Group32 = 1, kInt8Group256 = 2 };

}  // namespace tokenmill
