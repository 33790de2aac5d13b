// Which instruction-set paths exist, which this processor can run, and which one is in use.
//
// Every kernel source is compiled once per path, inside the namespace TM_ISA. Only portable arithmetic happens
// outside of those namespaces, so one shared library runs on any processor of its architecture.
#pragma once

#include <string_view>

namespace tokenmill {

enum class Isa : int {
  kPortable = 0,
  kAvx2 = 1,        // AVX2, FMA, F16C
  kAvx2Vnni = 2,    // + AVX-VNNI (256-bit vpdpbusd, VEX encoded)
  kAvx512 = 3,      // AVX-512 F, BW, DQ, VL
  kAvx512Vnni = 4,  // + AVX512-VNNI
  kNeon = 5,        // Armv8.2 with dot product and fp16 conversion
};

inline constexpr int kIsaCount = 6;

// The name used by TOKENMILL_ISA and printed by `tokenmill doctor`, e.g. "avx512vnni".
std::string_view isa_name(Isa isa);

// Compiled into this library and supported by this processor and its operating system.
bool isa_available(Isa isa);

// The path in use: the best available one, or the one that TOKENMILL_ISA names. Decided once, at first use.
// Throws std::runtime_error if TOKENMILL_ISA names an unknown or unavailable path.
Isa active_isa();

// Replaces the path in use (tests and benchmarks). Not safe while a step runs.
void set_active_isa(Isa isa);

// Whether a stream is better prefetched in bursts of some 40 lines than a few lines at a time. Measured on one row of
// Q4_K weights, share of the read bandwidth: Zen 5 95 to 98 % in bursts, 80 to 86 % spread; Cascade Lake, whose twelve
// line buffers a burst overruns, 77 to 85 % in bursts, 92 to 95 % spread.
bool prefers_burst_prefetch();

}  // namespace tokenmill
