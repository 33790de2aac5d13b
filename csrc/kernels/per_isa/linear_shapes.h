// Register-tile shapes of the Linear kernels on each path, and compile-time loops.
//
// No shape changes a bit: every output has its own accumulators and sees the same operations in the same order.
#pragma once

#include "kernels/linear.h"
#include "kernels/simd.h"

// Lambdas in unrolled loops must be inlined, or the accumulators they capture live on the stack.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define TM_UNROLLED
#else
#define TM_UNROLLED __attribute__((always_inline))
#endif

// Loops over registers: unrolled whole, so that the arrays they index become registers. Rather than a lambda per
// iteration, which costs many times its compile time.
#define TM_UNROLL _Pragma("GCC unroll 24")

namespace tokenmill::TM_ISA {

template <int kValue>
struct Index {
  static constexpr int value = kValue;
  TM_INLINE constexpr operator int() const { return kValue; }
};

template <int... kValues>
struct Indices {};
template <int kCount, int... kValues>
struct MakeIndices : MakeIndices<kCount - 1, kCount - 1, kValues...> {};
template <int... kValues>
struct MakeIndices<0, kValues...> {
  using type = Indices<kValues...>;
};

template <class Body, int... kValues>
TM_INLINE void unroll_over(Indices<kValues...>, [[maybe_unused]] Body body) {
  (body(Index<kValues>{}), ...);
}
// body(Index<0>{}) ... body(Index<kCount - 1>{}), each with a constant, so that arrays it indexes become registers.
template <int kCount, class Body>
TM_INLINE void unroll(Body body) {
  unroll_over(typename MakeIndices<kCount>::type{}, body);
}

// Rows of activations and row blocks of weights in one register tile of the many-row kernel.
// kDirect: row counts with a kernel of their own that reads the packed stream, descending; other counts are sums of these.
// kDirectRows: up to here reading the packed stream (again for every kDirect rows) beats unpacking a tile.
#if defined(TM_PATH_AVX512)
inline constexpr int kTileRows = 4, kTileBlocks = 3, kDirectRows = 12;
#if defined(TM_HAS_VNNI)
using DirectRows = Indices<8, 6, 4, 3, 2, 1>;
#else  // compute-bound from a few rows on
using DirectRows = Indices<4, 2, 1>;
#endif
#elif defined(TM_PATH_AVX2)
inline constexpr int kTileRows = 3, kTileBlocks = 1, kDirectRows = 8;
using DirectRows = Indices<4, 2, 1>;
#elif defined(TM_PATH_NEON)
inline constexpr int kTileRows = 3, kTileBlocks = 1, kDirectRows = 8;
using DirectRows = Indices<4, 2, 1>;
#else  // nothing stays in registers: one row at a time, quick to compile
inline constexpr int kTileRows = 1, kTileBlocks = 1, kDirectRows = 1;
using DirectRows = Indices<1>;
#endif

// Weights of 16 and 32 bits. A panel is the rows of one register tile.
// PackedPanels: row counts with a kernel that reads one packed row block, descending; more rows than the first one's read
// converted weights. ConvertedPanels: those of the kernels on kPanelBlocks converted row blocks and fewer.
#if defined(TM_PATH_AVX512)
inline constexpr int kPackedRows = 24, kPanelRows = 6, kPanelBlocks = 4;
using PackedPanels = Indices<24, 20, 16, 14, 12, 10, 8, 6, 5, 4, 3, 2, 1>;
using ConvertedPanels = Indices<6, 5, 4>;
#elif defined(TM_PATH_AVX2) || defined(TM_PATH_NEON)
inline constexpr int kPackedRows = 4, kPanelRows = 6, kPanelBlocks = 1;
using PackedPanels = Indices<4, 3, 2, 1>;
using ConvertedPanels = Indices<6, 5, 4, 3>;
#else
inline constexpr int kPackedRows = 1, kPanelRows = 1, kPanelBlocks = 1;
using PackedPanels = Indices<1>;
using ConvertedPanels = Indices<1>;
#endif
// Converted row blocks and rows of a sweep: weights and sums together take less than half of a 512 KiB second-level cache.
inline constexpr int kGroupBlocks = 8, kElementSweepRows = 192;

// Rows that share one unpacked tile; their accumulators wait in scratch.
inline constexpr int kSweepRows = 256;

// kBytes from `ahead` bytes after p on. The address may lie past the end; a prefetch does not fault.
template <int kBytes>
TM_INLINE void prefetch_lines(const uint8_t* p, size_t ahead) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(p) + ahead;
#pragma GCC unroll 80
  for (int line = 0; line < kBytes; line += 64) prefetch(reinterpret_cast<const void*>(begin + static_cast<uintptr_t>(line)));
}

}  // namespace tokenmill::TM_ISA
