// Loops that do nothing but reach one limit of the machine: streaming reads, int8 dot products, fp32 fma.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tokenmill {

struct RooflineKernels {
  // Reads `bytes` (a multiple of 1024) once, in order; returns a checksum so that nothing is optimized away.
  int32_t (*read)(const uint8_t* data, size_t bytes);
  // 12 independent accumulators of 16 lanes, `iterations` times one dot4 each: 12 * 128 int8 operations an iteration.
  int32_t (*dot_int8)(int64_t iterations);
  // 12 independent accumulators of 16 lanes, `iterations` times one fma each: 12 * 32 fp32 operations an iteration.
  float (*fma_f32)(int64_t iterations);
};

inline constexpr int64_t kInt8OperationsPerIteration = 12 * 128;
inline constexpr int64_t kF32OperationsPerIteration = 12 * 32;

const RooflineKernels& roofline_kernels();  // of the path in use

}  // namespace tokenmill
