// Loops that do nothing but reach one limit of the machine: streaming reads, int8 dot products, fp32 fma.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tokenmill {

struct RooflineKernels {
  // Reads `bytes` (a multiple of 1024) once, in order; returns a checksum so that nothing is optimized away.
  int32_t (*read)(const uint8_t* data, size_t bytes);
  // Independent accumulators of 16 lanes that stay in registers, `iterations` times one dot4 or fma each.
  int32_t (*dot_int8)(int64_t iterations);
  float (*fma_f32)(int64_t iterations);
  int64_t int8_operations;  // of one iteration: multiplications and additions
  int64_t f32_operations;
};

const RooflineKernels& roofline_kernels();  // of the path in use

}  // namespace tokenmill
