// What the lane operations of one path make of fixed inputs, as bytes.
#pragma once

#include <stdint.h>

struct SimdInputs {
  alignas(64) float a[16], b[16], c[16];
  alignas(64) int32_t i[16], j[16];
  alignas(64) uint8_t bytes[64], low4[64];
  alignas(64) uint8_t codes6[64];  // below 64
  alignas(64) uint8_t table[16];
  int32_t quad, pair;
};

constexpr int kSimdResults = 128;  // 64 bytes each; unused ones stay zero

struct SimdTable {
  // Fills out[kSimdResults][64]; returns how many entries were used.
  int (*run)(const SimdInputs& in, uint8_t* out);
};
