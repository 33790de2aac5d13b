#include "kernels/roofline.h"

#include "kernels/simd.h"

namespace tokenmill::TM_ISA {
namespace {

int32_t read(const uint8_t* data, size_t bytes) {
  // Eight streams in flight per iteration, and lines asked for 2 KiB ahead: the hardware prefetcher alone stops at
  // page borders.
  U8x64 a = set1_u8(0), b = a, c = a, d = a;
  for (size_t i = 0; i < bytes; i += 1024) {
    for (size_t line = 0; line < 1024; line += 256) {
      const uint8_t* p = data + i + line;
      for (size_t ahead = 0; ahead < 256; ahead += 64) prefetch(p + 2048 + ahead);
      a = bit_xor(a, load_u8x64(p));
      b = bit_xor(b, load_u8x64(p + 64));
      c = bit_xor(c, load_u8x64(p + 128));
      d = bit_xor(d, load_u8x64(p + 192));
    }
  }
  uint8_t bytes_left[64];
  store_u8x64(bytes_left, bit_xor(bit_xor(a, b), bit_xor(c, d)));
  int32_t sum = 0;
  for (uint8_t byte : bytes_left) sum += byte;
  return sum;
}

// Named accumulators, not an array: with an array g++ 12 keeps them on the stack and the loop shows half of the peak.
int32_t dot_int8(int64_t iterations) {
  U8x64 w = set1_u8(3);
  const int32_t quad = 0x01020301;
  I32x16 a = zero_i32(), b = a, c = a, d = a, e = a, f = a, g = a, h = a, i = a, j = a, k = a, l = a;
  for (int64_t n = 0; n < iterations; ++n) {
    a = dot4<4>(a, w, quad);
    b = dot4<4>(b, w, quad);
    c = dot4<4>(c, w, quad);
    d = dot4<4>(d, w, quad);
    e = dot4<4>(e, w, quad);
    f = dot4<4>(f, w, quad);
    g = dot4<4>(g, w, quad);
    h = dot4<4>(h, w, quad);
    i = dot4<4>(i, w, quad);
    j = dot4<4>(j, w, quad);
    k = dot4<4>(k, w, quad);
    l = dot4<4>(l, w, quad);
    // Pretend that the weights changed, or paths without inline assembly move half of the work out of the loop.
    __asm__ volatile("" : "+m"(w));
  }
  const I32x16 sum = add(add(add(add(a, b), add(c, d)), add(add(e, f), add(g, h))), add(add(i, j), add(k, l)));
  int32_t lanes[16], total = 0;
  store(lanes, sum);
  for (int32_t lane : lanes) total = static_cast<int32_t>(static_cast<uint32_t>(total) + static_cast<uint32_t>(lane));
  return total;
}

float fma_f32(int64_t iterations) {
  const F32x16 x = set1(0.999f), y = set1(0.001f);
  F32x16 a = set1(0.5f), b = a, c = a, d = a, e = a, f = a, g = a, h = a, i = a, j = a, k = a, l = a;
  for (int64_t n = 0; n < iterations; ++n) {
    a = fma(a, x, y);
    b = fma(b, x, y);
    c = fma(c, x, y);
    d = fma(d, x, y);
    e = fma(e, x, y);
    f = fma(f, x, y);
    g = fma(g, x, y);
    h = fma(h, x, y);
    i = fma(i, x, y);
    j = fma(j, x, y);
    k = fma(k, x, y);
    l = fma(l, x, y);
  }
  return reduce_add(add(add(add(add(a, b), add(c, d)), add(add(e, f), add(g, h))), add(add(i, j), add(k, l))));
}

}  // namespace

extern const RooflineKernels roofline_kernels_table;
const RooflineKernels roofline_kernels_table = {read, dot_int8, fma_f32};

}  // namespace tokenmill::TM_ISA
