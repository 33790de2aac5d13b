#include "platform/isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace tokenmill {
namespace {

constexpr std::string_view kNames[kIsaCount] = {"portable", "avx2", "avx2vnni", "avx512", "avx512vnni", "neon"};

#if defined(__x86_64__)
// AVX-VNNI is CPUID leaf 7, sub-leaf 1, EAX bit 4; g++ 12's __builtin_cpu_supports does not know it.
[[maybe_unused]] bool cpu_has_avx_vnni() {
  unsigned eax = 7, ebx = 0, ecx = 1, edx = 0;
  __asm__ volatile("cpuid" : "+a"(eax), "=b"(ebx), "+c"(ecx), "=d"(edx));
  return (eax >> 4) & 1U;
}
#endif

std::atomic<int>& active_slot() {
  static std::atomic<int> slot{-1};
  return slot;
}

Isa choose() {
  if (const char* wanted = std::getenv("TOKENMILL_ISA"); wanted != nullptr && *wanted != '\0') {
    std::string available;
    for (int i = 0; i < kIsaCount; ++i) {
      const Isa isa = static_cast<Isa>(i);
      if (!isa_available(isa)) continue;
      if (isa_name(isa) == wanted) return isa;
      available += (available.empty() ? "" : ", ") + std::string(isa_name(isa));
    }
    throw std::runtime_error("TOKENMILL_ISA=" + std::string(wanted) +
                             " is not an instruction-set path that this processor can run; choose one of: " + available);
  }
  for (Isa isa : {Isa::kAvx512Vnni, Isa::kAvx512, Isa::kAvx2Vnni, Isa::kAvx2, Isa::kNeon}) {
    if (isa_available(isa)) return isa;
  }
  return Isa::kPortable;
}

}  // namespace

std::string_view isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

bool isa_available(Isa isa) {
  switch (isa) {
    case Isa::kPortable:
      return true;
#if defined(__x86_64__)
    case Isa::kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    case Isa::kAvx2Vnni:
#if defined(TM_EVEX_AVX2VNNI)
      return isa_available(Isa::kAvx512Vnni);
#else
      return isa_available(Isa::kAvx2) && cpu_has_avx_vnni();
#endif
    case Isa::kAvx512:
      return isa_available(Isa::kAvx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    case Isa::kAvx512Vnni:
      return isa_available(Isa::kAvx512) && __builtin_cpu_supports("avx512vnni");
#elif defined(__aarch64__) && defined(__linux__)
    case Isa::kNeon:
      return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#endif
    default:
      return false;
  }
}

Isa active_isa() {
  int current = active_slot().load(std::memory_order_acquire);
  if (current < 0) {
    current = static_cast<int>(choose());
    active_slot().store(current, std::memory_order_release);
  }
  return static_cast<Isa>(current);
}

void set_active_isa(Isa isa) {
  if (!isa_available(isa)) {
    throw std::runtime_error("instruction-set path " + std::string(isa_name(isa)) + " is not available on this processor");
  }
  active_slot().store(static_cast<int>(isa), std::memory_order_release);
}

bool prefers_burst_prefetch() {
#if defined(__x86_64__)
  static const bool amd = __builtin_cpu_is("amd");
  return amd;
#else
  return false;
#endif
}

}  // namespace tokenmill
