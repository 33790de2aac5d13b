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
// Each starts from another value and the weights are made to look changed in every iteration, or the compiler folds the
// chains into one or moves work out of the loop.
//
// A step is as many quads as a chain adds before it settles its sum, in the instructions of four-bit codes.
#if defined(TM_SUMS_PAIRS)
constexpr int kStepQuads = QuadSum<4>::kMost, kChainStep = 1;  // products must differ, or they are computed once for all chains
#else
// One instruction a quad: nothing to share between chains. Long iterations, or the loop's speed depends on where its jump
// lies (processors that cannot cache some jumps decode such a loop anew each time).
constexpr int kStepQuads = 8, kChainStep = 0;
#endif

template <int kCount>
TM_INLINE int32_t dot_chains(int64_t iterations) {
  U8x64 w = set1_u8(3);
  uint8_t quads[64];
  for (int i = 0; i < 64; ++i) quads[i] = static_cast<uint8_t>(i % 4);
  QuadSum<4> a, b, c, d, e, f, g, h, i, j, k, l;
  a.begin(set1_i32(1)), b.begin(set1_i32(2)), c.begin(set1_i32(3)), d.begin(set1_i32(4));
  e.begin(set1_i32(5)), f.begin(set1_i32(6)), g.begin(set1_i32(7)), h.begin(set1_i32(8));
  i.begin(set1_i32(9)), j.begin(set1_i32(10)), k.begin(set1_i32(11)), l.begin(set1_i32(12));
  for (int64_t n = 0; n < iterations; ++n) {
    __asm__ volatile("" : "+m"(w));
#pragma GCC unroll 8
    for (int q = 0; q < kStepQuads; ++q) {
      const uint8_t* quad = quads + 4 * q;
      a.add(load_i32(quad), w);
      b.add(load_i32(quad + 1 * kChainStep), w);
      c.add(load_i32(quad + 2 * kChainStep), w);
      d.add(load_i32(quad + 3 * kChainStep), w);
      if constexpr (kCount == 12) {
        e.add(load_i32(quad + 4 * kChainStep), w);
        f.add(load_i32(quad + 5 * kChainStep), w);
        g.add(load_i32(quad + 6 * kChainStep), w);
        h.add(load_i32(quad + 7 * kChainStep), w);
        i.add(load_i32(quad + 8 * kChainStep), w);
        j.add(load_i32(quad + 9 * kChainStep), w);
        k.add(load_i32(quad + 10 * kChainStep), w);
        l.add(load_i32(quad + 11 * kChainStep), w);
      }
    }
    a.begin(a.total()), b.begin(b.total()), c.begin(c.total()), d.begin(d.total());
    if constexpr (kCount == 12) {
      e.begin(e.total()), f.begin(f.total()), g.begin(g.total()), h.begin(h.total());
      i.begin(i.total()), j.begin(j.total()), k.begin(k.total()), l.begin(l.total());
    }
  }
  const I32x16 first = add(add(a.total(), b.total()), add(c.total(), d.total()));
  const I32x16 second = add(add(e.total(), f.total()), add(g.total(), h.total()));
  const I32x16 third = add(add(i.total(), j.total()), add(k.total(), l.total()));
  int32_t lanes[16];
  uint32_t total = 0;
  store(lanes, add(add(first, second), third));
  for (int32_t lane : lanes) total += static_cast<uint32_t>(lane);
  return static_cast<int32_t>(total);
}

template <int kCount>
TM_INLINE float fma_chains(int64_t iterations) {
  const F32x16 x = set1(0.999f), y = set1(0.001f);
  F32x16 a = set1(0.1f), b = set1(0.2f), c = set1(0.3f), d = set1(0.4f), e = set1(0.5f), f = set1(0.6f);
  F32x16 g = set1(0.7f), h = set1(0.8f), i = set1(0.9f), j = set1(1.1f), k = set1(1.2f), l = set1(1.3f);
#pragma GCC unroll 8
  for (int64_t n = 0; n < iterations; ++n) {
    a = fma(a, x, y);
    b = fma(b, x, y);
    c = fma(c, x, y);
    d = fma(d, x, y);
    e = fma(e, x, y);
    f = fma(f, x, y);
    if constexpr (kCount == 12) {
      g = fma(g, x, y);
      h = fma(h, x, y);
      i = fma(i, x, y);
      j = fma(j, x, y);
      k = fma(k, x, y);
      l = fma(l, x, y);
    }
  }
  return reduce_add(add(add(add(add(a, b), add(c, d)), add(add(e, f), add(g, h))), add(add(i, j), add(k, l))));
}

// A path whose 16 lanes take two registers and more has room for fewer chains.
#if defined(TM_PATH_AVX512)
constexpr int kDotChains = 12, kFmaChains = 12;
#else
constexpr int kDotChains = 4, kFmaChains = 6;
#endif

int32_t dot_int8(int64_t iterations) { return dot_chains<kDotChains>(iterations); }
float fma_f32(int64_t iterations) { return fma_chains<kFmaChains>(iterations); }

}  // namespace

extern const RooflineKernels roofline_kernels_table;
const RooflineKernels roofline_kernels_table = {read, dot_int8, fma_f32, kDotChains * kStepQuads * 128, kFmaChains * 32};

}  // namespace tokenmill::TM_ISA
