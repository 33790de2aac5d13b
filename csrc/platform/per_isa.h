// Declares one kernel table per compiled instruction-set path and picks the one in use.
//
//   // in linear.cpp, compiled once per path:     const LinearKernels linear_kernels_table = {...};  (in TM_ISA)
//   // in linear_dispatch.cpp, compiled once:     TM_DEFINE_DISPATCH(LinearKernels, linear_kernels)
#pragma once

#include "platform/isa.h"

#define TM_DECLARE_TABLE_(TABLE, NAME, PATH) namespace PATH { extern const TABLE NAME##_table; }

#define TM_DEFINE_DISPATCH(TABLE, NAME)                          \
  namespace portable { extern const TABLE NAME##_table; }        \
  TM_DISPATCH_DECLARE_PATHS(TABLE, NAME)                         \
  const TABLE& NAME() {                                          \
    switch (active_isa()) {                                      \
      TM_DISPATCH_CASES(NAME)                                    \
      default:                                                   \
        return portable::NAME##_table;                           \
    }                                                            \
  }

#if defined(__x86_64__)
#define TM_DISPATCH_DECLARE_PATHS(TABLE, NAME) \
  TM_DECLARE_TABLE_(TABLE, NAME, avx2)         \
  TM_DECLARE_TABLE_(TABLE, NAME, avx2vnni)     \
  TM_DECLARE_TABLE_(TABLE, NAME, avx512)       \
  TM_DECLARE_TABLE_(TABLE, NAME, avx512vnni)
#define TM_DISPATCH_CASES(NAME)                                      \
  case Isa::kAvx2: return avx2::NAME##_table;                        \
  case Isa::kAvx2Vnni: return avx2vnni::NAME##_table;                \
  case Isa::kAvx512: return avx512::NAME##_table;                    \
  case Isa::kAvx512Vnni: return avx512vnni::NAME##_table;
#elif defined(__aarch64__)
#define TM_DISPATCH_DECLARE_PATHS(TABLE, NAME) TM_DECLARE_TABLE_(TABLE, NAME, neon)
#define TM_DISPATCH_CASES(NAME) \
  case Isa::kNeon: return neon::NAME##_table;
#else
#define TM_DISPATCH_DECLARE_PATHS(TABLE, NAME)
#define TM_DISPATCH_CASES(NAME)
#endif
